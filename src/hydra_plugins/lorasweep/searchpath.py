"""Lets Hydra find the sweeps that ship: `+sweeps=NAME`."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SweepsSearchPath(SearchPathPlugin):
    """Adds the folder that holds sweeps/ to the search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from lorasweep.config.conf_folder import sweeps_dir

        search_path.append("lorasweep", f"file://{sweeps_dir().parent}")
