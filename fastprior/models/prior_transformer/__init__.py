"""diffusers' network: the priors of Kandinsky, Karlo and Shap-E."""
