"Train with the CIFAR recipe: `python main.py --help`"
import sys
from dsb.cli import train_command

if __name__ == '__main__': sys.exit(train_command(recipe='cifar', prog='main.py'))
