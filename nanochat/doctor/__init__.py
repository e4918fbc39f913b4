"""What is wrong with a machine, found by running each thing that a run will need."""
