"""Hints: fields that options of other libraries correspond to, for messages about unknown keys.

The names are options of TRL 0.12 and 1.16, transformers' TrainingArguments, verl 0.9, OpenRLHF 0.9 and 0.11, safe-rlhf,
vLLM's sampling parameters, and OmniSafe's IPO and Simmer.
"""

from __future__ import annotations

FIELDS_OF = {
    "algorithm.advantages": "adv_estimator advantage_estimator",
    "algorithm.beta": "kl_coef kl_coeff init_kl_coef kl_loss_coef kl_ctrl",
    "algorithm.clip_range": "cliprange clip_ratio clip_ratio_low clip_ratio_high clip_range_ratio eps_clip "
    "epsilon epsilon_high eps_clip_low_high",
    "algorithm.cost_limit": "threshold safety_budget",
    "algorithm.dual_clip": "clip_ratio_c delta",
    "algorithm.entropy_coef": "entropy_coeff entropy_loss_coef",
    "algorithm.kl_estimator": "kl_penalty kl_loss_type",
    "algorithm.kl_importance_weighted": "use_bias_correction_kl",
    "algorithm.kl_placement": "use_kl_loss use_kl_in_reward",
    "algorithm.kl_target": "target_kl kl_horizon",
    "algorithm.loss_agg_mode": "loss_type",
    "algorithm.scale_by_std": "scale_rewards norm_adv_by_std_in_grpo",
    "critic.gae_lambda": "lam lambd",
    "critic.lr": "critic_lr critic_learning_rate",
    "data.column": "prompt_key input_key dataset_text_field",
    "data.eval": "eval_dataset eval_datasets val_files",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len",
    "data.train": "train_dataset train_datasets train_files dataset dataset_name prompt_data",
    "loggers": "report_to logger log_type",
    "model.compile": "torch_compile use_torch_compile",
    "model.dtype": "torch_dtype bf16",
    "model.lora_rank": "lora_r use_peft",
    "model.path": "model_name_or_path actor_model_name_or_path model_name pretrain",
    "model.shard": "fsdp_size zero_stage",
    "optimizer.betas": "adam_betas adam_beta1 adam_beta2",
    "optimizer.clip_norm": "max_grad_norm grad_clip max_norm",
    "optimizer.epochs": "ppo_epochs num_ppo_epochs update_iters num_iterations max_epochs",
    "optimizer.lr": "learning_rate actor_lr actor_learning_rate",
    "optimizer.micro_batch_tokens": "ppo_max_token_len_per_gpu per_device_train_batch_size micro_train_batch_size "
    "ppo_micro_batch_size_per_gpu gradient_accumulation_steps",
    "optimizer.minibatches": "num_mini_batches mini_batch_size ppo_mini_batch_size",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler",
    "optimizer.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "out": "output_dir save_path default_local_dir logging_dir",
    "penalty.initial": "lambda_init kappa",
    "penalty.limit_start": "upper_budget",
    "penalty.lr": "lambda_lr",
    "penalty.max": "lambda_max penalty_max",
    "ptx.coef": "ptx_coeff",
    "ptx.data": "ptx_datasets",
    "rollout.max_response_tokens": "max_completion_length max_response_length response_length max_length "
    "generate_max_len max_tokens",
    "rollout.prompts_per_step": "train_batch_size rollout_batch_size batch_size num_prompts",
    "rollout.samples_per_prompt": "num_generations n_samples_per_prompt num_return_sequences rloo_k group_size",
    "rollout.stop_tokens": "stop_token stop_token_id stop_token_ids eos_token_id stop",
    "rollout.truncated": "mask_truncated_completions overlong_buffer missing_eos_penalty",
    "save_every": "save_steps save_freq save_interval",
    "scoring.clamp": "clip_range_score",
    "scoring.cost": "cost_model_name_or_path",
    "scoring.reward": "reward_model reward_model_path reward_model_name_or_path reward_funcs",
    "steps": "max_steps total_training_steps",
}
"""Field -> names that other libraries give it, separated by spaces."""

ELSEWHERE = {name: field for field, names in FIELDS_OF.items() for name in names.split()}
"""Name in another library -> field of this configuration."""

OF_COMMANDS = {
    "shield": "a filter at generation time, which training cannot have, since the ratio of its loss would be wrong: "
    "python -m repo.evaluate RUN --shield N",
}
"""Switches of other commands -> what to say where they are given as a field."""
