"""`tidal drill`: the rehearsal of a job, with what it will be killed by."""
