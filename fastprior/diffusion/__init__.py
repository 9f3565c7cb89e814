"""The numbers of diffusion alone: schedules, and solvers as tables."""
