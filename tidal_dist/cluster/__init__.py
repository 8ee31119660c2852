"""Jobs of many hosts: who they are, how they are reached, what their ranks need, and who sees that they go on."""
