"""What runs on the devices: programs, memory, and who launches them."""
