"""The settings of a run: what there is, the layers that they come from, presets and recipes, and TOML."""

from safesteer_lite.config.layers import (
    ENVIRONMENT_PREFIX,
    LOWEST_TEMPERATURE,
    Values,
    build,
    from_environment,
    parse_assignments,
)
from safesteer_lite.config.presets import (
    QUICK,
    RECIPES_IN_WORDS,
    preset_folder,
    preset_names,
    preset_values,
    recipe_values,
)
from safesteer_lite.config.sections import (
    RECIPES,
    SECTIONS,
    ContextName,
    DirectionConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    ParentConfig,
    PromptsConfig,
    RunConfig,
    TokensConfig,
    known_settings,
)
from safesteer_lite.config.setting import Bounds
from safesteer_lite.config.toml import flatten, parse_toml, read_toml, to_record, to_toml

__all__ = [
    "ENVIRONMENT_PREFIX",
    "LOWEST_TEMPERATURE",
    "QUICK",
    "RECIPES",
    "RECIPES_IN_WORDS",
    "SECTIONS",
    "Bounds",
    "ContextName",
    "DirectionConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ModelConfig",
    "ParentConfig",
    "PromptsConfig",
    "RunConfig",
    "TokensConfig",
    "Values",
    "build",
    "flatten",
    "from_environment",
    "known_settings",
    "parse_assignments",
    "parse_toml",
    "preset_folder",
    "preset_names",
    "preset_values",
    "read_toml",
    "recipe_values",
    "to_record",
    "to_toml",
]
