//! Products that an entry-wise method merges, tile by tile: each adapter's is made from its factors as often
//! as the method looks at it, and never lies in memory whole.

use std::borrow::Cow;
use std::cell::RefCell;
use std::ops::Range;

use super::accumulator::Real;
use super::tile::{Scan, Stage};
use crate::entrywise::{Finder, Room, Selection};
use crate::error::Result;
use crate::kernel::{self, Factors, InstructionSet};
use crate::tensor::dtype::Dtype;

thread_local! {
    /// What merging needs beside the tiles, kept from tile to tile.
    static ROOM: RefCell<Room> = RefCell::default();
}

/// What each of one segment's adapters adds, without its weight.
#[derive(Debug)]
pub(super) struct Products {
    set: InstructionSet,
    columns: usize,
    adapters: Vec<Own>,
}

/// What one adapter adds.
#[derive(Debug)]
pub(super) enum Own {
    /// Products, packed for the accumulator's type.
    Products(Vec<Factors>),
    /// What it makes of W₀, less W₀.
    Change(Box<Stage>),
}

/// The products of a segment, and what the method makes of them.
#[derive(Debug)]
pub(super) struct Entries {
    products: Products,
    selection: Selection,
}

/// A row as it was merged.
#[derive(Debug)]
pub(crate) struct MergedRow {
    /// What is added to W₀.
    pub merged: Vec<f64>,
    /// What each adapter adds, without its weight.
    pub own: Vec<Vec<f64>>,
}

impl Products {
    pub fn new(set: InstructionSet, columns: usize, adapters: Vec<Own>) -> Self {
        Self { set, columns, adapters }
    }

    /// Whether all that is added is made without W₀.
    fn are_alone(&self) -> bool {
        self.adapters.iter().all(|own| matches!(own, Own::Products(_)))
    }

    /// What each adapter adds in some rows of the segment, of which W₀ is `start`; where nothing is made
    /// of that, it may be empty.
    fn tile<T: Real>(&self, rows: &Range<usize>, start: &[T]) -> Result<Vec<Vec<T>>> {
        let added = |own: &Own| match own {
            Own::Products(products) => {
                let mut values = vec![T::default(); rows.len() * self.columns];
                for factors in products {
                    let bytes = bytemuck::cast_slice_mut(&mut values);
                    kernel::merge_rows(self.set, factors, rows.start, &T::DTYPE, bytes);
                }
                Ok(values)
            }
            Own::Change(stage) => {
                let (mut scratch, mut result) = (start.to_vec(), start.to_vec());
                let columns = self.columns;
                stage.apply(self.set, rows, columns, start, &mut scratch, &mut result)?;
                let less = |(value, first): (&mut T, &T)| {
                    *value = T::from_f64(value.to_f64() - first.to_f64());
                };
                result.iter_mut().zip(start).for_each(less);
                Ok(result)
            }
        };
        self.adapters.iter().map(added).collect()
    }

    /// Shows all tiles of a segment, whose first row in the tensor that is, to a finder, as often as it asks
    /// for them.
    fn show<T: Real>(
        &self,
        finder: &mut Finder,
        segment: &Range<usize>,
        tile_rows: usize,
        scan: &mut Scan<'_>,
    ) -> Result<()> {
        while !finder.is_done() {
            let mut counters = finder.counters();
            let mut count = |rows: Range<usize>, start: &[T]| -> Result<()> {
                let tile = self.tile::<T>(&rows, start)?;
                finder.count(&mut counters, rows.start, &slices(&keys(&tile)));
                Ok(())
            };
            if self.are_alone() {
                for start in (0..segment.len()).step_by(tile_rows) {
                    count(start..segment.len().min(start + tile_rows), &[])?;
                }
            } else {
                scan(&mut |first_row, bytes| {
                    if !segment.contains(&first_row) {
                        return Ok(());
                    }
                    let values = bytes.chunks_exact(size_of::<T>());
                    let start: Vec<T> = values.map(bytemuck::pod_read_unaligned).collect();
                    let first = first_row - segment.start;
                    count(first..first + start.len() / self.columns, &start)
                })?;
            }
            finder.advance(vec![counters]);
        }
        Ok(())
    }

    /// With what was found out before.
    pub fn with(self, selection: Selection) -> Entries {
        Entries { products: self, selection }
    }

    /// Finds out what the method has to know of a segment. `scan` streams W₀ where something is made of it.
    pub fn select(
        self,
        mut finder: Finder,
        segment: &Range<usize>,
        (tile_rows, dtype): (usize, &Dtype),
        scan: &mut Scan<'_>,
    ) -> Result<Entries> {
        match dtype {
            Dtype::F64 => self.show::<f64>(&mut finder, segment, tile_rows, scan)?,
            _ => self.show::<f32>(&mut finder, segment, tile_rows, scan)?,
        }
        Ok(Entries { products: self, selection: finder.selection() })
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

    /// Adds the merged update to rows of the segment, of which W₀ is `start`.
    pub fn apply<T: Real>(&self, rows: &Range<usize>, start: &[T], result: &mut [T]) -> Result<()> {
        let mut merged = vec![0.0; result.len()];
        self.merge::<T>(rows, start, &mut merged)?;
        for (target, value) in result.iter_mut().zip(merged) {
            *target = T::from_f64(target.to_f64() + value);
        }
        Ok(())
    }

    /// The merged update of rows of the segment, and those that it is made of.
    fn merge<T: Real>(
        &self,
        rows: &Range<usize>,
        start: &[T],
        merged: &mut [f64],
    ) -> Result<Vec<Vec<T>>> {
        let tile = self.products.tile::<T>(rows, start)?;
        let keys = keys(&tile);
        let values: Vec<&[T]> = tile.iter().map(Vec::as_slice).collect();
        ROOM.with_borrow_mut(|room| {
            self.selection.merge(rows.start, &slices(&keys), &values, room, merged);
        });
        drop(keys);
        Ok(tile)
    }

    /// One row of the segment. `base` gives W₀'s rows.
    pub fn row(
        &self,
        row: usize,
        dtype: &Dtype,
        base: &dyn Fn(usize) -> Result<Vec<f64>>,
    ) -> Result<MergedRow> {
        let first = row / kernel::ROW_MULTIPLE * kernel::ROW_MULTIPLE;
        let rows = first..row + 1;
        let columns = self.products.columns;
        let mut merged = vec![0.0; rows.len() * columns];
        let start = match self.products.are_alone() {
            true => Vec::new(),
            false => rows.clone().map(base).collect::<Result<Vec<_>>>()?.concat(),
        };
        let own = match dtype {
            Dtype::F64 => self.merge::<f64>(&rows, &start, &mut merged)?,
            _ => {
                let start: Vec<f32> = start.iter().map(|value| *value as f32).collect();
                let own = self.merge::<f32>(&rows, &start, &mut merged)?.into_iter();
                own.map(|values| values.into_iter().map(f64::from).collect()).collect()
            }
        };
        let last = (row - first) * columns..;
        let of_row = |values: Vec<f64>| values[last.clone()].to_vec();
        let own = own.into_iter().map(of_row).collect();
        Ok(MergedRow { merged: of_row(merged), own })
    }
}
