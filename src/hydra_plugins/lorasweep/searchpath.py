"""Lets Hydra find the sweeps that ship (`+sweeps=NAME`), and the options of --config-dir."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class SweepsSearchPath(SearchPathPlugin):
    """Adds the folder that holds sweeps/ to the search path, and a folder of options."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from lorasweep.config import conf_folder

        for provider, path in conf_folder.search_path():
            search_path.append(provider, path)
