"""What a method can be told. A section is a group of dotted keys (``queue.size``); ``engine.config`` composes the sections into the
whole configuration. Needs no torch."""

from ppssl.settings.methods import (
    SETTINGS,
    BYOLSettings,
    LcrConfig,
    LCRSettings,
    LdfsConfig,
    LDFSSettings,
    MoCoSettings,
    PPSSLSettings,
    Sections,
    Settings,
    SimCLRSettings,
    get_key,
    idle_keys,
    method_settings,
    replace_keys,
    resolve_variant,
    settings_class,
    title,
    variant,
)
from ppssl.settings.sections import (
    FREE,
    OF_RUN,
    SAID,
    AisConfig,
    BatchNormConfig,
    ContrastConfig,
    Distinct,
    EmaConfig,
    EncoderConfig,
    IadmConfig,
    MethodConfig,
    Part,
    QueueConfig,
    Resume,
    Source,
    TeacherConfig,
)

__all__ = [
    "FREE", "OF_RUN", "SAID", "SETTINGS", "AisConfig", "BYOLSettings", "BatchNormConfig", "ContrastConfig", "Distinct", "EmaConfig",
    "EncoderConfig", "IadmConfig", "LCRSettings", "LDFSSettings", "LcrConfig", "LdfsConfig", "MethodConfig", "MoCoSettings",
    "PPSSLSettings", "Part", "QueueConfig", "Resume", "Sections", "Settings", "SimCLRSettings", "Source", "TeacherConfig",
    "get_key", "idle_keys", "method_settings", "replace_keys", "resolve_variant", "settings_class", "title", "variant",
]  # fmt: skip
