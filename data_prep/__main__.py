"""python -m evspan.data_prep is `evspan prep`."""

from evspan.data_prep.prep import main

if __name__ == "__main__":
    main()
