"""The command line: each command has a file NAME_command.py, its words and flags first.

In come words; out goes an exit code, 2 with one line for a mistake of the user. `main.py` lists the
commands and is the file to open first; `command_line.py` has what they share. `train` and `sweep`
are a Hydra app: `train_command.py` has the job that Hydra runs, `choose_folder.py` its folder.
"""
