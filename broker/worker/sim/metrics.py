"""`/metrics` under the names of the engine that is simulated."""

from __future__ import annotations

from broker.worker.sim.engine import SimulatedEngine


def render(sim: SimulatedEngine, dialect: str) -> str:
    """Prometheus text: running, waiting, KV use, prefix cache; labelled as the engine labels them."""
    load, model = sim.load(), sim.model
    usage = model.cache.used / model.cache.capacity
    hits, asked = model.cached_tokens, model.prompt_tokens
    name = sim.models[0] if sim.models else sim.name
    if dialect == "sglang":
        labels = f'{{model_name="{name}",engine_type="unified",tp_rank="0",pp_rank="0"}}'
        block = model.cache.block_size
        samples: dict[str, float] = {
            f"sglang:num_running_reqs{labels}": load.running,
            f"sglang:num_queue_reqs{labels}": load.waiting,
            f"sglang:token_usage{labels}": usage,
            f"sglang:num_used_tokens{labels}": model.cache.used * block,
            f"sglang:max_total_num_tokens{labels}": model.cache.capacity * block,
            f"sglang:cache_hit_rate{labels}": hits / asked if asked else 0.0,
        }
    elif dialect == "fastdeploy":
        samples = {
            "fastdeploy:num_requests_running": load.running,
            "fastdeploy:num_requests_waiting": load.waiting,
            "fastdeploy:gpu_cache_usage_perc": usage,
            "fastdeploy:available_gpu_block_num": model.cache.capacity - model.cache.used,
            "fastdeploy:hit_token_rate": hits / asked if asked else 0.0,
        }
    else:
        labels = f'{{engine="0",model_name="{name}"}}'
        cache = f'{{block_size="{model.cache.block_size}",engine="0",num_gpu_blocks="{model.cache.capacity}"}}'
        samples = {
            f"vllm:num_requests_running{labels}": load.running,
            f"vllm:num_requests_waiting{labels}": load.waiting,
            f"vllm:kv_cache_usage_perc{labels}": usage,
            f"vllm:prefix_cache_queries_total{labels}": asked,
            f"vllm:prefix_cache_hits_total{labels}": hits,
            f"vllm:cache_config_info{cache}": 1.0,
        }
    lines = []
    for sample, value in samples.items():
        family = sample.partition("{")[0]
        lines.append(f"# TYPE {family} {'counter' if family.endswith('_total') else 'gauge'}")
        lines.append(f"{sample} {float(value)}")
    return "\n".join(lines) + "\n"
