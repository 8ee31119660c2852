"""Before a job of many hosts: every host looked at, then all of them together; go or no-go, with remedies."""
