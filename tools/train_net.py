#!/usr/bin/env python
"""Trains or evaluates a detector, with detectron2's standard command line.

    tools/train_net.py --config-file configs/COCO-Detection/faster_rcnn_MNV2_FPN_dk_l3_1x.yaml \
        --num-gpus 8 MODEL.WEIGHTS weights.pth OUTPUT_DIR output/mnv2_dk_l3
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/mnv2_dk_l3/model_final.pth

Without a GPU it runs on the CPU; there --num-gpus is the number of processes.
"""

from detectron2.engine import default_argument_parser, launch

from dk_detectron.checkpoint import Checkpointer
from dk_detectron.engine import Trainer, setup


def main(args):
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        return Trainer.test(cfg, model)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
