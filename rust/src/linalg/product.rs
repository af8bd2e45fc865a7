//! `XᵀY` for matrices of which the long side is summed over.

use rayon::prelude::*;

use super::Matrix;

/// Columns that a packed panel holds side by side.
pub(crate) const PANEL: usize = 8;

/// Positions on the long side that are packed at a time.
const DEPTH: usize = 128;

/// Positions on the long side that one unit of work adds up.
const CHUNK: usize = 2048;

/// A tall matrix, `length` × `width`, that is read piece by piece.
pub(crate) trait LongSide: Sync {
    /// The extent that products sum over.
    fn length(&self) -> usize;

    /// The number of columns.
    fn width(&self) -> usize;

    /// Rows `start..end` as columns one after another, `end - start` values each.
    fn read(&self, start: usize, end: usize, output: &mut [f64]);

    /// Rows `start..end` as panels of [`PANEL`] columns, row after row in each, the last one
    /// filled up with zeros. `scratch` is room for whoever needs it.
    fn pack(&self, start: usize, end: usize, scratch: &mut Vec<f64>, output: &mut [f64]) {
        let depth = end - start;
        scratch.resize(depth * self.width(), 0.0);
        let columns = &mut scratch[..];
        self.read(start, end, columns);
        output.fill(0.0);
        for (index, column) in columns.chunks_exact(depth.max(1)).enumerate() {
            let panel = &mut output[index / PANEL * depth * PANEL..];
            for (row, &value) in panel.chunks_exact_mut(PANEL).zip(column) {
                row[index % PANEL] = value;
            }
        }
    }
}

impl LongSide for Matrix {
    fn length(&self) -> usize {
        self.rows
    }

    fn width(&self) -> usize {
        self.columns
    }

    fn read(&self, start: usize, end: usize, output: &mut [f64]) {
        if start == end {
            return;
        }
        for (column, target) in output.chunks_exact_mut(end - start).enumerate() {
            target.copy_from_slice(&self.column(column)[start..end]);
        }
    }
}

/// `XᵀX`.
#[cfg(test)]
pub(crate) fn gram(x: &dyn LongSide) -> Matrix {
    multiply(x, None, true).0
}

/// `XᵀX`, and the sum of each column.
pub(crate) fn gram_and_sums(x: &dyn LongSide) -> (Matrix, Vec<f64>) {
    multiply(x, None, true)
}

/// `XᵀX` by the calling thread alone, of whoever gives each thread work of its own: the same bits.
pub(crate) fn gram_by_one_thread(x: &dyn LongSide) -> Matrix {
    multiply(x, None, false).0
}

/// `XᵀY`, of matrices of one length.
pub(crate) fn cross_product(x: &dyn LongSide, y: &dyn LongSide) -> Matrix {
    assert_eq!(x.length(), y.length(), "both sides run over one extent");
    multiply(x, Some(y), true).0
}

/// The product, and without `y` the sums of the columns.
fn multiply(x: &dyn LongSide, y: Option<&dyn LongSide>, is_shared_out: bool) -> (Matrix, Vec<f64>) {
    let length = x.length();
    let chunks: Vec<usize> = (0..length).step_by(CHUNK).collect();
    let part = |&start: &usize| multiply_chunk(x, y, start, length.min(start + CHUNK));
    // The parts are added in their order, so that the sum does not depend on the threads.
    let parts: Vec<Part> = if !is_shared_out || chunks.len() <= 1 {
        chunks.iter().map(part).collect()
    } else {
        chunks.par_iter().map(part).collect()
    };
    let (rows, columns) = (x.width(), y.map_or(x.width(), LongSide::width));
    let mut result = Matrix::zeros(rows, columns);
    let column_panels = columns.div_ceil(PANEL);
    let mut sums = vec![0.0; if y.is_some() { 0 } else { columns }];
    for Part { tiles: part, sums: part_sums } in parts {
        for (sum, value) in sums.iter_mut().zip(part_sums) {
            *sum += value;
        }
        for column in 0..columns {
            for row in 0..rows {
                let (mut a, mut b) = (row, column);
                if y.is_none() && a / PANEL > b / PANEL {
                    std::mem::swap(&mut a, &mut b);
                }
                let tile = (a / PANEL * column_panels + b / PANEL) * PANEL * PANEL;
                result.data[column * rows + row] += part[tile + a % PANEL * PANEL + b % PANEL];
            }
        }
    }
    (result, sums)
}

/// What one unit of work adds up.
struct Part {
    /// The product as 8×8 tiles, row-major in each and among each other. Of a matrix with itself
    /// only the tiles on and above the diagonal are filled.
    tiles: Vec<f64>,
    /// Of a matrix with itself the sums of its columns, filled up with zeros.
    sums: Vec<f64>,
}

/// The product over `start..end`.
fn multiply_chunk(x: &dyn LongSide, y: Option<&dyn LongSide>, start: usize, end: usize) -> Part {
    let row_panels = x.width().div_ceil(PANEL);
    let column_panels = y.map_or(row_panels, |y| y.width().div_ceil(PANEL));
    let mut tiles = vec![0.0; row_panels * column_panels * PANEL * PANEL];
    let depth = DEPTH.min(end - start);
    let mut scratch = Vec::new();
    let mut packed_x = vec![0.0; row_panels * PANEL * depth];
    let mut packed_y = vec![0.0; if y.is_some() { column_panels * PANEL * depth } else { 0 }];
    let mut sums = vec![0.0; if y.is_some() { 0 } else { column_panels * PANEL }];
    for from in (start..end).step_by(DEPTH) {
        let to = end.min(from + DEPTH);
        let panel = (to - from) * PANEL;
        x.pack(from, to, &mut scratch, &mut packed_x[..row_panels * panel]);
        let right = if let Some(y) = y {
            y.pack(from, to, &mut scratch, &mut packed_y[..column_panels * panel]);
            &packed_y
        } else {
            let panels = packed_x.chunks_exact(panel);
            for (panel, sums) in panels.zip(sums.as_chunks_mut::<PANEL>().0) {
                add_rows(panel, sums);
            }
            &packed_x
        };
        let tiles = tiles.as_chunks_mut::<{ PANEL * PANEL }>().0;
        for row in 0..row_panels {
            let first = if y.is_none() { row } else { 0 };
            for column in first..column_panels {
                add_tile(
                    &packed_x[row * panel..(row + 1) * panel],
                    &right[column * panel..(column + 1) * panel],
                    &mut tiles[row * column_panels + column],
                );
            }
        }
    }
    Part { tiles, sums }
}

crate::kernel::vector::vectorized! {
    /// Adds the rows of a packed panel to `sums`, four partial sums side by side.
    fn add_rows(panel: &[f64], sums: &mut [f64; PANEL]) {
        let mut partial = [[0.0; PANEL]; 4];
        let (blocks, rest) = panel.as_chunks::<{ 4 * PANEL }>();
        for block in blocks {
            let rows = block.as_chunks::<PANEL>().0;
            for (partial, row) in partial.iter_mut().zip(rows) {
                for (sum, value) in partial.iter_mut().zip(row) {
                    *sum += value;
                }
            }
        }
        for (partial, row) in partial.iter_mut().zip(rest.as_chunks::<PANEL>().0) {
            for (sum, value) in partial.iter_mut().zip(row) {
                *sum += value;
            }
        }
        let [a, b, c, d] = partial;
        for place in 0..PANEL {
            sums[place] += (a[place] + b[place]) + (c[place] + d[place]);
        }
    }
}

/// Adds the product of two packed panels to a tile, `ROWS` of its rows at a time in registers.
/// Products of values that came from f32 are exact in f64, so whether they are fused makes no
/// difference to the bits of a spectrum.
#[inline(always)]
fn add_tile_body<const ROWS: usize, const FUSED: bool>(
    x: &[f64],
    y: &[f64],
    tile: &mut [f64; PANEL * PANEL],
) {
    let x = x.as_chunks::<PANEL>().0;
    let y = y.as_chunks::<PANEL>().0;
    for first in (0..PANEL).step_by(ROWS) {
        let mut sums = [[0.0f64; PANEL]; ROWS];
        for row in 0..ROWS {
            for column in 0..PANEL {
                sums[row][column] = tile[(first + row) * PANEL + column];
            }
        }
        for (a, b) in x.iter().zip(y) {
            for row in 0..ROWS {
                for column in 0..PANEL {
                    sums[row][column] = if FUSED {
                        a[first + row].mul_add(b[column], sums[row][column])
                    } else {
                        a[first + row] * b[column] + sums[row][column]
                    };
                }
            }
        }
        for row in 0..ROWS {
            for column in 0..PANEL {
                tile[(first + row) * PANEL + column] = sums[row][column];
            }
        }
    }
}

fn add_tile(x: &[f64], y: &[f64], tile: &mut [f64; PANEL * PANEL]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn wide(x: &[f64], y: &[f64], tile: &mut [f64; PANEL * PANEL]) {
            add_tile_body::<8, true>(x, y, tile);
        }
        #[target_feature(enable = "avx2,fma")]
        fn medium(x: &[f64], y: &[f64], tile: &mut [f64; PANEL * PANEL]) {
            add_tile_body::<4, true>(x, y, tile);
        }
        if crate::kernel::vector::has_avx512() {
            // SAFETY: the processor has every feature that `wide` enables.
            return unsafe { wide(x, y, tile) };
        }
        if crate::kernel::vector::has_avx2() {
            // SAFETY: the processor has every feature that `medium` enables.
            return unsafe { medium(x, y, tile) };
        }
    }
    add_tile_body::<4, { cfg!(target_arch = "aarch64") }>(x, y, tile);
}
