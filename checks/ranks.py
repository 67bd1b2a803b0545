"""Do torchrun's numbers, the options and the model fit together?"""
from checks.files import show

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def check_ranks(environment, device, ranks=None):
    """environment: the variables that torchrun sets. ranks: so many form a model."""
    for name in VARIABLES:
        value = environment.get(name, "")
        whole = name == "MASTER_ADDR" or value.isascii() and value.isdigit()
        if not value or not whole:
            found = f"is {show(value)}" if value else "is not set"
            raise ValueError(f"{name} {found}; start all ranks with torchrun, or one process with "
                             "neither RANK nor WORLD_SIZE set")
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= world:
        raise ValueError(f"RANK {rank} is none of WORLD_SIZE {world}; start them with torchrun")
    if ranks and world % ranks:
        raise ValueError(f"--tensor-parallel {ranks} does not divide torchrun's {world} ranks")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {show(device)}: under torchrun give cpu, or cuda, which is one "
                         "GPU for each rank")


def check_parts(config, ranks):
    """Has every rank a part of every matrix?"""
    least = min(config.intermediate_size, config.vocab_size)
    if least < ranks:
        raise ValueError(f"{ranks} ranks cannot share a model of intermediate_size "
                         f"{config.intermediate_size} and vocab_size {config.vocab_size}; start "
                         f"at most {least}")
