"""Running a user's Pyro model: log joint, particles, traces, supports, the parameter store."""
