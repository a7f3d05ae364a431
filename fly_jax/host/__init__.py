"""Files and logs of the machine that the engine runs on."""
