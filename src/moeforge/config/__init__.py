"""What a run is told: the model's configuration (plain), the training file (checked by pydantic), presets.

Nothing is imported here, so that `moeforge.config.model` and `moeforge.config.presets` stay free of pydantic.
"""
