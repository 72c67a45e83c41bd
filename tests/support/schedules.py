"""Schedules of requests on an engine that runs in this process, and what its scheduler does to them."""

from engines import greedy, scheduler


def serve_alone(llm):
    """Tokens of a prompt served alone: a function of (prompt, count), remembered."""
    seen = {}

    def run(prompt, count):
        key = (tuple(prompt["prompt_token_ids"]), count)
        if key not in seen:
            seen[key] = list(greedy(llm, [prompt], count)[0].token_ids)
        return seen[key]

    return run


def tokens(outputs):
    return [list(output.token_ids) for output in outputs]


def count_preemptions(llm):
    """A list that grows by (request, tokens it had generated) with each preemption."""
    preempted, preempt = [], scheduler(llm)._preempt_request

    def note(request, *args, **kwargs):
        preempted.append((request.request_id.split("-")[0], request.num_output_tokens))
        return preempt(request, *args, **kwargs)

    scheduler(llm)._preempt_request = note
    return preempted


def host_memory_for(pages, page_size):
    """GiB that hold so many pages of `tiny_llama(4, 2, 64)`: 2 layers, 2 KV heads, head size 64, float32."""
    return pages * page_size * 2 * 2 * 2 * 64 * 4 / (1 << 30)


def note_lone_tokens(llm):
    """Requests whose last prompt token comes alone, after others of the prompt: it decodes, and so it selects."""
    noted, schedule = set(), scheduler(llm).schedule

    def note(*args, **kwargs):
        planned = schedule(*args, **kwargs)
        for name, count in planned.num_scheduled_tokens.items():
            request = scheduler(llm).requests[name]
            is_last = request.num_computed_tokens in (request.num_prompt_tokens - 1, request.num_prompt_tokens)
            if count == 1 and is_last and request.num_output_tokens == 0:
                noted.add(name)
        return planned

    scheduler(llm).schedule = note
    return noted


def run_schedule(llm, prompts, requests):
    """Submit, step and abort as the requests say: tokens of those that finished, by index."""
    from vllm import SamplingParams

    core, finished, started, step = llm.llm_engine, {}, {}, 0
    waiting = dict(enumerate(requests))
    while waiting or core.has_unfinished_requests():
        for i in [i for i, r in waiting.items() if r["arrives"] <= step]:
            parameters = SamplingParams(
                temperature=0, max_tokens=waiting.pop(i)["tokens"], ignore_eos=True, detokenize=False
            )
            core.add_request(str(i), prompts[i], parameters)
            started[i] = step
        for output in core.step():
            if output.finished:
                finished[int(output.request_id)] = list(output.outputs[0].token_ids)
        for i, start in list(started.items()):
            limit = requests[i]["aborted_after"]
            if limit is not None and step - start >= limit and i not in finished:
                core.abort_request([str(i)])
                del started[i]
        step += 1
        assert step < 5000, "the schedule does not end"
    return finished
