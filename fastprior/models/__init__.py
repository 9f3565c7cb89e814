"""The networks of priors, each as a prefill of what does not depend on the step and a step behind it."""
