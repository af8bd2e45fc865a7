//! Products that an entry-wise method merges, tile by tile: each adapter's is made from its factors as often
//! as the method looks at it, and never lies in memory whole.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::accumulator::Real;
use crate::entrywise::{Finder, Room, Selection};
use crate::kernel::{self, Factors, InstructionSet};
use crate::tensor::dtype::Dtype;

thread_local! {
    /// What merging needs beside the tiles, kept from tile to tile.
    static ROOM: RefCell<Room> = RefCell::default();
}

/// The products of one segment's adapters, packed without their weights.
#[derive(Debug)]
pub(super) struct Products {
    set: InstructionSet,
    columns: usize,
    /// For each adapter those that it adds, packed for the accumulator's type.
    adapters: Vec<Vec<Factors>>,
}

/// The products of a segment, and what the method makes of them.
#[derive(Debug)]
pub(super) struct Entries {
    products: Products,
    selection: Selection,
}

impl Products {
    pub fn new(set: InstructionSet, columns: usize, adapters: Vec<Vec<Factors>>) -> Self {
        Self { set, columns, adapters }
    }

    /// Each adapter's product in some rows of the segment.
    fn tile<T: Real>(&self, rows: &Range<usize>) -> Vec<Vec<T>> {
        let product = |factors: &Vec<Factors>| {
            let mut values = vec![T::default(); rows.len() * self.columns];
            for factors in factors {
                let bytes = bytemuck::cast_slice_mut(&mut values);
                kernel::merge_rows(self.set, factors, rows.start, &T::DTYPE, bytes);
            }
            values
        };
        self.adapters.iter().map(product).collect()
    }

    /// Shows all tiles of the segment to a finder, as often as it asks for them.
    fn show<T: Real>(&self, finder: &mut Finder, rows: usize, tile_rows: usize) {
        while !finder.is_done() {
            let mut counters = finder.counters();
            for start in (0..rows).step_by(tile_rows) {
                let tile = self.tile::<T>(&(start..rows.min(start + tile_rows)));
                let keys = keys(&tile);
                finder.count(&mut counters, start, &slices(&keys));
            }
            finder.advance(vec![counters]);
        }
    }

    /// With what was found out before.
    pub fn with(self, selection: Selection) -> Entries {
        Entries { products: self, selection }
    }

    /// Finds out what the method has to know of a segment of so many rows.
    pub fn select(
        self,
        mut finder: Finder,
        rows: usize,
        tile_rows: usize,
        dtype: &Dtype,
    ) -> Entries {
        match dtype {
            Dtype::F64 => self.show::<f64>(&mut finder, rows, tile_rows),
            _ => self.show::<f32>(&mut finder, rows, tile_rows),
        }
        Entries { products: self, selection: finder.selection() }
    }
}

/// The values by which elements are ordered.
fn keys<T: Real>(tile: &[Vec<T>]) -> Vec<Cow<'_, [f32]>> {
    tile.iter()
        .map(|values| match T::DTYPE {
            Dtype::F32 => Cow::Borrowed(bytemuck::cast_slice::<T, f32>(values)),
            _ => Cow::Owned(values.iter().map(|value| value.to_f64() as f32).collect()),
        })
        .collect()
}

fn slices<'a>(keys: &'a [Cow<'_, [f32]>]) -> Vec<&'a [f32]> {
    keys.iter().map(|values| &**values).collect()
}

impl Entries {
    /// What was found out of the whole segment.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// Adds the merged product to rows of the segment.
    pub fn apply<T: Real>(&self, rows: &Range<usize>, result: &mut [T]) {
        let mut merged = vec![0.0; result.len()];
        self.merge::<T>(rows, &mut merged);
        for (target, value) in result.iter_mut().zip(merged) {
            *target = T::from_f64(target.to_f64() + value);
        }
    }

    /// The merged product of rows of the segment, and those that it is made of.
    fn merge<T: Real>(&self, rows: &Range<usize>, merged: &mut [f64]) -> Vec<Vec<T>> {
        let tile = self.products.tile::<T>(rows);
        let keys = keys(&tile);
        let values: Vec<&[T]> = tile.iter().map(Vec::as_slice).collect();
        ROOM.with_borrow_mut(|room| {
            self.selection.merge(rows.start, &slices(&keys), &values, room, merged);
        });
        drop(keys);
        tile
    }

    /// The merged product of one row of the segment, and each adapter's own.
    pub fn row(&self, row: usize, dtype: &Dtype) -> (Vec<f64>, Vec<Vec<f64>>) {
        let first = row / kernel::ROW_MULTIPLE * kernel::ROW_MULTIPLE;
        let rows = first..row + 1;
        let columns = self.products.columns;
        let mut merged = vec![0.0; rows.len() * columns];
        let own = match dtype {
            Dtype::F64 => self.merge::<f64>(&rows, &mut merged),
            _ => {
                let own = self.merge::<f32>(&rows, &mut merged).into_iter();
                own.map(|values| values.into_iter().map(f64::from).collect()).collect()
            }
        };
        let last = (row - first) * columns..;
        let of_row = |values: Vec<f64>| values[last.clone()].to_vec();
        (of_row(merged), own.into_iter().map(of_row).collect())
    }
}
