from .model.patching import apply_to as apply_to

__version__: str
