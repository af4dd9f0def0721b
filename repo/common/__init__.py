"""What every part of the loop uses: errors, files, seeds, memory of the C library, processes."""
