"""What has become of a run: who hangs, who has ended, who is slow. Needs neither torch nor deepspeed."""
