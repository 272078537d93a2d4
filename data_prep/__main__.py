"""python -m data_prep is `evspan prep`."""

from data_prep.prep import main

if __name__ == "__main__":
    main()
