"""LightningModules for the backbones that this repository trains itself."""
