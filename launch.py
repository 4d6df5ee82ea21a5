"""The one entry point: a composed configuration becomes a tracked run of a trainer.

    python launch.py student=vgg8 distiller=sp spot_mode=fixed epochs=10
    python launch.py -m distiller=kd,fitnet,at,sp,pkt spot_mode=fixed,adaptive seed=0,1,2

The same command again resumes a run, or shows its result once it is finished. `sakd launch` is the same.
"""

from sakd.launch import run  # its @hydra.main is what Hydra's completion looks for in this text

if __name__ == "__main__":
    run()
