"""Multiruns and sweeps: in come Hydra's config and command line, out go trained runs and a study.

Open run_sweep.py first, the driver of `lorasweep sweep`: sweep_file.py reads what is searched,
study/ asks Optuna, sweep_loop.py trains trials and prunes them, sweep_limits.py ends it.
multirun.py trains the jobs of `train -m`. Packs train in the processes of worker_pool.py, or as
jobs of a cluster (slurm_ray_joblib.py) that report as trial_job.py says; compose_jobs.py composes.

Nothing is imported here: Hydra's plug-ins and the settings of a study need one file each.
"""
