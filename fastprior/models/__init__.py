"""The networks of priors: what does not depend on the step runs once, and a step runs behind it.

Both families offer one pair. `prefill(text, times) -> conditioning` computes the prefix, the keys and values of the
text in every layer; `step(x, index, conditioning) -> prediction` runs the few tokens of a noisy embedding behind it. A
conditioning may pass through `share(conditioning, samples)`, for several samples of each prompt, and through `prepare`,
for steps of another network with the same weights, such as a quantised one.

- dalle2: `DiffusionPriorNetwork` makes tokens, `CausalTransformer` runs them (transformer.py).
- prior_transformer: `PriorForward` makes tokens (forward.py), functions run them through blocks (cached_blocks.py).
"""
