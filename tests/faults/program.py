"""A program that uses the engine under mpirun or srun, as a user writes it."""

from pipeinfer import Engine

if __name__ == "__main__":
    with Engine() as engine:
        if engine is not None:
            print(engine.generate("def read_lines(path):\n", 40, ignore_eos=True).text)
