"""Hydra's way into a folder of options (--config-dir): see lorasweep.config.foreign_settings."""

# Hydra's scanner runs this file outside sys.modules: keep dataclasses and real code out of it.
import io
from pathlib import Path

from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from omegaconf import OmegaConf


class OptionsFolder(ConfigSource):
    """Files of a folder, each of which is checked before Hydra sees what it says."""

    @staticmethod
    def scheme() -> str:
        return "options"

    def load_config(self, config_path: str) -> ConfigResult:
        from lorasweep.config.foreign_settings import read_options

        name = self._normalize_file_name(config_path)
        if not self.is_config(name):
            raise ConfigLoadError(f"Config not found : {Path(self.path, name)}")
        text = read_options(Path(self.path), name, lambda one: self._header(one).get("package"))
        return ConfigResult(
            config=OmegaConf.load(io.StringIO(text)),  # type: ignore[arg-type]
            path=self.full_path(),
            provider=self.provider,
            header=self._header(text),
        )

    def available(self) -> bool:
        return Path(self.path).is_dir()

    def is_group(self, config_path: str) -> bool:
        return Path(self.path, config_path).is_dir()

    def is_config(self, config_path: str) -> bool:
        return Path(self.path, self._normalize_file_name(config_path)).is_file()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        found: list[str] = []
        for one in Path(self.path, config_path).iterdir():
            self._list_add_result(found, str(Path(config_path, one.name)), one.name, results_filter)
        return sorted(set(found))

    def _header(self, text: str) -> dict[str, str | None]:
        return self._get_header_dict(text[:512])
