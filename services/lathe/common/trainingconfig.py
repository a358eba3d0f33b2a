"""The version of the contract between jobs and engines about what a job is trained with."""

# Rises with every field of TrainingConfig or Attempt that an engine must heed: one of another version is replaced.
CONFIG_VERSION = 1
