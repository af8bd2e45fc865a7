//! Some adapters' factors of one module, stacked; and the products of two such stacks.

use super::collection::Collection;
use super::load::{Factors, Reader, Real};
use crate::error::Result;
use crate::kernel::large_pages::zeros;
use crate::kernel::vector::vectorized;
use crate::linalg::{Multiply, View};

/// Ranks that a tile holds side by side, where no adapter alone has more. As large as the products
/// need to run at full speed, and small enough for a tile of the results to stay in the cache.
pub(super) const TILE_RANKS: usize = 512;
/// Adapters that a tile holds at most: results are a number for each pair of them.
const TILE_MEMBERS: usize = 256;

/// Neighbouring adapters, by their positions in the order of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tile {
    pub start: usize,
    pub end: usize,
    /// The sum of the members' largest ranks.
    pub ranks: usize,
}

impl Tile {
    pub fn len(&self) -> usize {
        self.end - self.start
    }
}

/// Cuts a group of members into tiles, whatever the memory or the threads, so that these do not
/// decide about the last bits of a product.
pub(super) fn cut(collection: &Collection, order: &[usize]) -> Vec<Tile> {
    let mut tiles: Vec<Tile> = Vec::new();
    for (position, &member) in order.iter().enumerate() {
        let pieces = &collection.members[member].pieces;
        let rank = pieces.iter().map(|piece| piece.rank).max().unwrap_or(0);
        match tiles.last_mut() {
            Some(tile) if tile.ranks + rank <= TILE_RANKS && tile.len() < TILE_MEMBERS => {
                tile.end = position + 1;
                tile.ranks += rank;
            }
            _ => tiles.push(Tile { start: position, end: position + 1, ranks: rank }),
        }
    }
    tiles
}

/// A tile's factors of one module.
pub(super) struct Stack<T> {
    /// B of all, (m, ranks): a row holds those of one adapter beside those of the next.
    left: Vec<T>,
    /// Aᵀ of all, (n, ranks).
    right: Vec<T>,
    rows: usize,
    columns: usize,
    /// For each adapter that has the module: its position in the tile, its first rank and the one
    /// after its last, and its scale.
    parts: Vec<StackPart>,
}

/// Where the products of two tiles' factors stand before they are summed, kept from one pair of
/// tiles to the next.
#[derive(Default)]
pub(super) struct Scratch<T>([Vec<T>; 2]);

impl<T: Real> Scratch<T> {
    /// Two tables of so many values: any, for what is read of them is written before.
    fn room(&mut self, count: usize) -> [&mut [T]; 2] {
        self.0.each_mut().map(|table| {
            if table.len() < count {
                *table = zeros(count);
            }
            &mut table[..count]
        })
    }
}

struct StackPart {
    member: usize,
    first: usize,
    end: usize,
    scale: f64,
    /// ‖X‖² in f64, where it was asked for.
    square: f64,
}

/// Columns of a stack's products with itself that are made at once: those rows that lie below
/// them are left out.
const SELF_COLUMNS: usize = 128;

impl<T: Real> Stack<T> {
    /// Reads what the members of a tile have of a module, and takes their squares if these are
    /// wanted.
    pub fn read(
        collection: &Collection,
        members: &[usize],
        module: usize,
        with_squares: bool,
    ) -> Result<Self> {
        let info = &collection.modules[module];
        let mut parts = Vec::new();
        let mut ranks = 0;
        for (position, &member) in members.iter().enumerate() {
            if let Some(piece) = collection.members[member].piece(module) {
                let end = ranks + piece.rank;
                parts.push(StackPart {
                    member: position,
                    first: ranks,
                    end,
                    scale: 0.0,
                    square: 0.0,
                });
                ranks = end;
            }
        }
        let mut left = zeros::<T>(info.rows * ranks);
        let mut right = zeros::<T>(info.columns * ranks);
        for part in &mut parts {
            let member = &collection.members[members[part.member]];
            let piece = member.piece(module).expect("was found above");
            let factors = Reader::new(member)?.factors::<T>(piece)?;
            part.scale = factors.scale;
            if with_squares {
                part.square = square(&factors, piece.rank);
            }
            for (row, source) in left.chunks_exact_mut(ranks).zip(factors.b.chunks(piece.rank)) {
                row[part.first..part.end].copy_from_slice(source);
            }
            transpose(&factors.a, info.columns, &mut right, ranks, part.first);
        }
        Ok(Self { left, right, rows: info.rows, columns: info.columns, parts })
    }

    /// Whether no member has the module.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    fn ranks(&self) -> usize {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// Multiplications that the products with another tile take.
    pub fn work(&self, other: &Self) -> u64 {
        (self.ranks() * other.ranks()) as u64 * (self.rows + self.columns) as u64
    }

    /// ⟨X, Y⟩ for each member X of this tile and Y of the other, added to a table with a row for
    /// each member of this one: block sums of (𝐁ᵀ𝐁)∘(𝐀𝐀ᵀ). The products have the precision of
    /// T; they are multiplied with each other and added up in f64. Of a tile with itself only what
    /// lies on and above the diagonal is made, with the squares that it was read with.
    pub fn add_products(
        &self,
        other: &Self,
        scratch: &mut Scratch<T>,
        width: usize,
        table: &mut [f64],
    ) {
        let (ranks, others) = (self.ranks(), other.ranks());
        let is_itself = std::ptr::eq(self, other);
        let [outputs, inputs] = scratch.room(ranks * others);
        let step = if is_itself { SELF_COLUMNS } else { others.max(1) };
        for first in (0..others).step_by(step) {
            let columns = step.min(others - first);
            let rows = if is_itself { first + columns } else { ranks };
            for (left, right, depth, table) in [
                (&self.left, &other.left, self.rows, &mut *outputs),
                (&self.right, &other.right, self.columns, &mut *inputs),
            ] {
                let view = |data, first, count, width| View {
                    data,
                    first,
                    depth,
                    depth_step: width,
                    count,
                    step: 1,
                };
                let (left, right) =
                    (view(left, 0, rows, ranks), view(right, first, columns, others));
                T::multiply(left, right, &mut table[first * ranks..], ranks);
            }
        }
        for theirs in &other.parts {
            for ours in &self.parts {
                if is_itself && ours.member >= theirs.member {
                    break;
                }
                let mut sum = 0.0;
                for column in theirs.first..theirs.end {
                    let lines = column * ranks + ours.first..column * ranks + ours.end;
                    sum += T::dot(&outputs[lines.clone()], &inputs[lines]);
                }
                table[ours.member * width + theirs.member] += ours.scale * theirs.scale * sum;
            }
        }
        if is_itself {
            for part in &self.parts {
                table[part.member * width + part.member] += part.square;
            }
        }
    }
}

/// Lines and columns that are transposed at a time, within the registers.
const SQUARE: usize = 8;

/// Puts lines of `columns` values into rows of `stride`, from place `first` of each on.
fn transpose<T: Real>(lines: &[T], columns: usize, target: &mut [T], stride: usize, first: usize) {
    if columns == 0 {
        return;
    }
    for (group, lines) in lines.chunks(SQUARE * columns).enumerate() {
        let place = first + group * SQUARE;
        let count = lines.len() / columns;
        let whole = if count == SQUARE { columns / SQUARE * SQUARE } else { 0 };
        for start in (0..whole).step_by(SQUARE) {
            let mut square = [[T::default(); SQUARE]; SQUARE];
            for (line, values) in lines.chunks_exact(columns).enumerate() {
                let values: &[T; SQUARE] =
                    values[start..start + SQUARE].try_into().expect("as many as asked for");
                for (row, value) in square.iter_mut().zip(values) {
                    row[line] = *value;
                }
            }
            for (row, values) in target[start * stride..].chunks_mut(stride).zip(&square) {
                row[place..place + SQUARE].copy_from_slice(values);
            }
        }
        for (line, values) in lines.chunks_exact(columns).enumerate() {
            for (column, value) in values.iter().enumerate().skip(whole) {
                target[column * stride + place + line] = *value;
            }
        }
    }
}

/// s²·Σ(BᵀB)∘(AAᵀ) in f64, whatever the factors are held in.
fn square<T: Real>(factors: &Factors<T>, rank: usize) -> f64 {
    let wide = |values: &[T]| values.iter().map(|value| value.to_f64()).collect::<Vec<f64>>();
    let gram = |values: &[T], depth: usize, depth_step: usize, step: usize| {
        let data = wide(values);
        let view = View { data: &data, first: 0, depth, depth_step, count: rank, step };
        let mut gram = vec![0.0; rank * rank];
        f64::multiply(view, view, &mut gram, rank);
        gram
    };
    let (rows, columns) = (factors.b.len() / rank, factors.a.len() / rank);
    let outputs = gram(&factors.b, rows, rank, 1);
    let inputs = gram(&factors.a, columns, 1, columns);
    factors.scale * factors.scale * dot_f64(&outputs, &inputs)
}

/// Sums that run side by side in a dot product, whatever the vector width.
const LANES: usize = 8;

macro_rules! dot {
    ($name:ident, $type:ty) => {
        vectorized! {
            /// Σ xᵢyᵢ in f64, in a fixed order.
            pub(super) fn $name(x: &[$type], y: &[$type]) -> f64 {
                let mut lanes = [0.0f64; LANES];
                let (x_blocks, x_rest) = x.as_chunks::<LANES>();
                let (y_blocks, y_rest) = y.as_chunks::<LANES>();
                for (a, b) in x_blocks.iter().zip(y_blocks) {
                    for lane in 0..LANES {
                        lanes[lane] += f64::from(a[lane]) * f64::from(b[lane]);
                    }
                }
                for (lane, (a, b)) in x_rest.iter().zip(y_rest).enumerate() {
                    lanes[lane] += f64::from(*a) * f64::from(*b);
                }
                lanes.iter().sum()
            }
        }
    };
}

dot!(dot_f32, f32);
dot!(dot_f64, f64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_any_number_and_length_are_transposed() {
        for (count, columns) in [(1, 1), (8, 8), (16, 24), (19, 21), (3, 40), (24, 5), (4, 0)] {
            let lines: Vec<f32> = (0..count * columns).map(|value| value as f32).collect();
            let (stride, first) = (count + 5, 2);
            let mut found = vec![-1.0; columns * stride];
            transpose(&lines, columns, &mut found, stride, first);
            for (place, &value) in found.iter().enumerate() {
                let (column, line) = (place / stride, place % stride);
                let own = (first..first + count).contains(&line);
                let expected = if own { lines[(line - first) * columns + column] } else { -1.0 };
                assert_eq!(value, expected, "{count} × {columns}: {line}, {column}");
            }
        }
    }
}
