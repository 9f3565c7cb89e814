"""What dalle2-pytorch's own training script asks of a trainer, a tracker and readers, in its order."""

import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed


def train(config_path, initial=None):
    """Train as the config says, from given weights if any: the trainer, and what was logged, as (log, step)."""
    from dalle2_pytorch import DiffusionPriorTrainer
    from dalle2_pytorch.dataloaders import get_reader, make_splits
    from dalle2_pytorch.train_configs import TrainDiffusionPriorConfig
    from dalle2_pytorch.utils import Timer

    accelerator = Accelerator(cpu=True)
    config = TrainDiffusionPriorConfig.from_json_path(str(config_path))
    options, conditioned = config.train, config.prior.condition_on_text_encodings
    set_seed(options.random_seed)
    trainer = DiffusionPriorTrainer(
        diffusion_prior=config.prior.create(), lr=options.lr, wd=options.wd, max_grad_norm=options.max_grad_norm,
        amp=options.amp, use_ema=options.use_ema, device=accelerator.device, accelerator=accelerator,
        warmup_steps=options.warmup_steps,
    ).to(accelerator.device)  # fmt: skip
    if initial is not None:
        accelerator.unwrap_model(trainer.diffusion_prior).load_state_dict(initial)
    about = {"Distributed": False, "NumProcesses": accelerator.num_processes, "MixedPrecision": "no"}
    tracker = config.tracker.create(config, about, dummy_mode=accelerator.process_index != 0)
    tracker.save_config(str(config_path), config_name="prior_config.json")
    logged, log = [], tracker.log

    def keep(values, step=None):
        logged.append(({name: float(value) for name, value in values.items()}, step))
        log(values, step=step)

    tracker.log = keep

    first, best, seen = options.current_epoch, options.best_validation_loss, options.num_samples_seen
    if tracker.can_recall:
        state = tracker.recall()
        trainer.load(state, strict=True)
        first, best = int(state.get("epoch", 0)), state.get("best_validation_loss", 0)
        seen = int(state.get("samples_seen", 0))
    trainer.accelerator.wait_for_everyone()
    reader = get_reader(
        text_conditioned=trainer.text_conditioned, img_url=config.data.image_url, meta_url=config.data.meta_url
    )
    loaders = make_splits(
        text_conditioned=trainer.text_conditioned, batch_size=config.data.batch_size,
        num_data_points=config.data.num_data_points, train_split=config.data.splits.train,
        eval_split=config.data.splits.val, image_reader=reader, rank=accelerator.state.process_index,
        world_size=accelerator.state.num_processes, start=0,
    )  # fmt: skip
    if tracker.can_recall:
        loaders[0].dataset.set_start(min(seen, len(loaders[0].dataset)))

    def gathered(value, how=torch.mean):
        value = value if torch.is_tensor(value) else torch.tensor([value])
        value = trainer.accelerator.gather(trainer.accelerator.pad_across_processes(value.to(trainer.device), dim=0))
        return how(value[value != 0])

    def measure(name, use_ema, loader, sample):
        trainer.eval()
        prior = trainer.accelerator.unwrap_model(trainer.diffusion_prior)
        assert all(prior.sample_timesteps <= n <= prior.noise_scheduler.num_timesteps for n in options.eval_timesteps)
        for images, tokens in loader if sample else ():
            text_embed, encodings = trainer.embed_text(tokens.to(trainer.device))
            rolled = torch.roll(torch.arange(len(text_embed)), 1)
            conditions = (dict(text_embed=text_embed, text_encodings=encodings),
                          dict(text_embed=text_embed[rolled], text_encodings=encodings[rolled]))  # fmt: skip
            for steps in options.eval_timesteps:
                own, unrelated = (trainer.p_sample_loop(images.shape, cond, timesteps=steps) for cond in conditions)
                tracker.log({
                    f"{name}/similarity [steps={steps}]": gathered(torch.cosine_similarity(own, images)),
                    f"{name}/unrelated [steps={steps}]": gathered(torch.cosine_similarity(unrelated, text_embed)),
                }, step=trainer.step.item() + 1)  # fmt: skip
        total = torch.zeros(1, device=trainer.device)
        for images, tokens in loader:
            batch = dict(image_embed=images.to(trainer.device), text=tokens.to(trainer.device))
            total += trainer.ema_diffusion_prior(**batch) if use_ema else trainer(**batch)
        loss = gathered(total)
        tracker.log({f"{name}/{config.prior.loss_type}-loss": loss}, step=trainer.step.item() + 1)
        return loss

    def save(**which):
        trainer.accelerator.wait_for_everyone()
        tracker.save(trainer=trainer, epoch=int(epoch), samples_seen=int(seen), best_validation_loss=best, **which)

    timer = Timer()
    for epoch in range(first, options.epochs):
        tracker.log({"tracking/epoch": epoch}, step=trainer.step.item())
        if loaders[0].dataset.get_start() > 0 and epoch > first:
            loaders[0].dataset.set_start(0)
        for images, tokens in loaders[0]:
            trainer.train()
            step = trainer.step.item()
            timer.reset()
            loss = trainer(text=tokens.to(trainer.device), image_embed=images.to(trainer.device))
            trainer.update()
            seen += gathered(len(tokens), torch.sum)
            speed = gathered(len(tokens), torch.sum) / max(timer.elapsed(), 1e-9)
            decay = trainer.ema_diffusion_prior.get_current_decay()
            tracker.log({"tracking/samples-sec": speed, "tracking/samples-seen": seen, "tracking/ema-decay": decay,
                         f"tracking/training-{config.prior.loss_type}": gathered(loss)}, step=step)  # fmt: skip
        began = time.time()
        measure("metrics/online-validation", False, loaders[1], sample=False)
        loss = measure("metrics/ema-validation", True, loaders[1], sample=conditioned)
        tracker.log({"tracking/validation length (minutes)": (time.time() - began) / 60})
        if loss < best:
            best = loss
            save(is_best=True, is_latest=False)
        save(is_best=False, is_latest=True)
    measure("metrics/ema-test", True, loaders[2], sample=False)
    return trainer, logged
