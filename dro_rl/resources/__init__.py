"""What a run will need, told before it: work, memory by phase and device, disk, time. Nothing is trained here."""
