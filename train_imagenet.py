"Train with the ImageNet recipe: `python train_imagenet.py --help`"
import sys
from dsb.cli import train_command

if __name__ == '__main__': sys.exit(train_command(recipe='imagenet', prog='train_imagenet.py'))
