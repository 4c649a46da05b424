"""What surrounds the trainer in a run: checks, models, warm-up, the output folder, what is printed."""
