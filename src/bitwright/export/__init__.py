"""Exchange with other programs: native folders to their formats, and their quantized checkpoints to native folders."""
