"""Multiruns and sweeps: in come Hydra's config and command line, out go trained runs and a study.

Open run_sweep.py first, the driver of `lorasweep sweep`: sweep_file.py reads what is searched,
study/ asks Optuna, sweep_loop.py trains and prunes trials. multirun.py trains the jobs of
`train -m`. Packs train in processes (worker_pool.py) or as jobs of a cluster (trial_job.py).

Nothing is imported here: Hydra's plug-ins and the settings of a study need one file each.
"""
