"""What a run will need, told before it: work, memory by phase and device, disk, time. A calibration alone trains."""
