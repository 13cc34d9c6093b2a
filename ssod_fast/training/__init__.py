"""The training loop around a method: configuration, trainer, evaluation, checkpoints and logs.

Everything here belongs to the extra `[train]`; nothing of it is imported by `import ssod_fast`.
"""
