"""The mistakes that mutations.py plants in speed/parallel*.py, speed/ranks.py and the replicas of study/:
{(file, tests): [(description, old text, new text), ...]}."""
PARALLEL = "tests/test_speed_parallel.py"
STUDY = "tests/test_study_parallel.py"

TABLE = {
    ("speed/parallel.py", f"{PARALLEL} -k two"): [
        ("the gradient of the readable loop divided by the number of ranks",
         "return total((gradient[..., head.mine] @ head.weight).float()), None",
         "return total((gradient[..., head.mine] @ head.weight).float()) / size(), None"),
        ("gradient not reduced, readable loop",
         "return total((gradient[..., head.mine] @ head.weight).float()), None",
         "return (gradient[..., head.mine] @ head.weight).float(), None"),
        ("vocabulary offset forgotten in the logits", "logits[..., head.mine] =",
         "logits[..., :len(head.weight)] ="),
        ("vocabulary offset forgotten in the gradient", "gradient[..., head.mine] @",
         "gradient[..., :len(head.weight)] @"),
        ("vocabulary offset forgotten in a tied head",
         "weight[self.mine].detach()",
         "weight[:self.mine.stop - self.mine.start].detach()"),
        ("the bias of o_proj and down_proj added by every rank",
         "kept = weight if rank() == 0 else torch.zeros_like(weight)", "kept = weight"),
        ("o_proj not summed",
         "            layer.self_attn.o_proj.register_forward_hook(lambda module, x, y: total(y))",
         "            pass"),
        ("down_proj not summed",
         "        layer.mlp.down_proj.register_forward_hook(lambda module, x, y: total(y))\n", ""),
        ("o_proj summed although attention is whole", '        if "o_proj" in parts:\n',
         "        if parts:\n"),
        ("every rank takes the first key/value heads", "K * rank() // ranks * D", "0"),
    ],
    ("speed/parallel_delta.py", f"{PARALLEL} -k two"): [
        ("δ divided by the number of ranks (as in the authors' way through vLLM)",
         "    return delta, torch.stack(losses)\n", "    return delta / dist.get_world_size(), torch.stack(losses)\n"),
        ("maximum not reduced", "z -= total(z.amax(1), op=dist.ReduceOp.MAX)[:, None]",
         "z -= z.amax(1)[:, None]"),
        ("partition sums not reduced", "total(torch.stack((E.sum(1), log_a)))",
         "torch.stack((E.sum(1), log_a))"),
        ("gradient not reduced, closed form", "total(transposed(r / max(n, 1), W))",
         "transposed(r / max(n, 1), W)"),
        ("vocabulary offset forgotten in the prompt's tokens", " - head.mine.start\n", "\n"),
        ("a range error on one rank stays there", "if total((~b.isfinite()).sum()) > 0:",
         "if not b.isfinite().all():"),
    ],
    ("speed/parallel.py", f"{PARALLEL} -k reads_its_part_only"): [
        ("a whole model is kept by every rank on its way",
         "    return kept.clone(memory_format=torch.contiguous_format)",
         "    WHOLE.append(weight.clone())\n"
         "    return kept.clone(memory_format=torch.contiguous_format)\n"
         "\n"
         "\n"
         "WHOLE = []"),
    ],
    ("study/results.py", f"{STUDY} -k files_of"): [
        ("the files of other replicas are not read", "for file in result_files(self.path.parent):\n            data",
         "for file in [self.path]:\n"
         "            data"),
        ("a cut line of another replica is cut off while that one writes",
         "if whole < len(data) and file == self.path:",
         "if whole < len(data) and os.truncate(file, whole) is None:"),
    ],
    ("study/run.py", f"{STUDY} -k ranks_of_one_model"): [
        ("all replicas but the first have nothing to do", "batches_of(study)[replica::replicas]",
         "batches_of(study)[replica::1 << 30]"),
        ("every replica writes a report as it ends", "writes = not missing", "pass"),
    ],
    ("study/measure.py", f"{STUDY} -k ranks_of_one_model"): [
        ("the alignment's gradient is not summed over ranks",
         "return gradient if len(residual) == self.vocabulary else speed.ranks.total(gradient)",
         "return gradient"),
        ("the alignment's gradient is of the first rows",
         'residual[getattr(self.lm_head, "mine", slice(None))]', "residual[:len(weight)]"),
    ],
}
