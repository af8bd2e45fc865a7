//! What a method has to know of a whole tensor, found in passes over its tiles.

use std::sync::Arc;

use super::masks::Mask;
use super::method::{Join, Method, Trim, part_of};
use super::order::{Counts, Cut, Layout, Search};
use super::ranks::{self, RowRanks};
use super::selection::{Keep, Selection, deviations};

/// Finds out what a method has to know of the updates of one tensor.
///
/// While it is not done, every tile of all updates is counted by some thread's [`Counters`] once, and all of
/// those are given back.
#[derive(Debug)]
pub struct Finder {
    method: Method,
    layout: Layout,
    weights: Vec<f64>,
    masks: Vec<Mask>,
    /// Updates of the tensor that are zero, beside those that come as tiles.
    missing: usize,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// For each update, the searches of all bounds.
    Magnitudes(Vec<Vec<Search>>),
    /// The number of positions where the variance is not zero.
    Spread,
    Variance(Search),
    Squares(Cut),
    /// Of each update the ranks in rows so far; `next` is the first row that has none.
    Ranks {
        next: usize,
        updates: Vec<RowRanks>,
    },
    Done(Vec<Keep>),
}

/// What one thread counts in one pass.
#[derive(Debug)]
pub struct Counters {
    searches: Vec<Counts>,
    /// Positions where the variance is not zero.
    spread: u64,
    /// Sums of squares of each row, update after update.
    squares: Vec<f64>,
    /// Rows that are gathered to be ranked, of each update.
    gathered: Vec<Vec<f32>>,
    room: Vec<f32>,
}

impl Finder {
    /// Begins with the updates of a tensor of that shape, each with its weight and its random numbers, and
    /// so many adapters that do not change it.
    pub fn new(
        method: Method,
        [rows, columns]: [usize; 2],
        weights: Vec<f64>,
        masks: Vec<Mask>,
        missing: usize,
    ) -> Self {
        let elements = rows as u64 * columns as u64;
        let of_each = |searches: Vec<Search>| vec![searches; weights.len()];
        let stage = match method.trim {
            Trim::Largest { density } => {
                let k = part_of(density, elements);
                Stage::Magnitudes(of_each(vec![Search::new(elements, k)]))
            }
            Trim::Middle { density, gamma } => {
                let k = part_of(density, elements);
                let top = part_of(gamma, elements).min(elements - k);
                let bounds = vec![Search::new(elements, top), Search::new(elements, top + k)];
                Stage::Magnitudes(of_each(bounds))
            }
            Trim::Random { density } => {
                let keep = |mask: &Mask| Keep::Random { mask: *mask, density };
                Stage::Done(masks.iter().map(keep).collect())
            }
            Trim::Ranked { density, epsilon } => {
                let keep = |mask: &Mask| Keep::Ranked { mask: *mask, density, epsilon };
                Stage::Done(masks.iter().map(keep).collect())
            }
            Trim::Variance { share: 1.0 } => Stage::Squares(Cut::ALL),
            Trim::Variance { .. } => Stage::Spread,
        };
        let layout = Layout { rows, columns, is_transposed: false };
        let mut finder = Self { method, layout, weights, masks, missing, stage };
        finder.settle();
        finder
    }

    /// The same for tiles whose rows are the updates' columns.
    #[must_use]
    pub fn transposed(mut self) -> Self {
        self.layout.is_transposed = true;
        if self.method.looks_at_rows() {
            let updates = vec![RowRanks::new(self.layout); self.weights.len()];
            self.stage = Stage::Ranks { next: 0, updates };
            self.settle();
        }
        self
    }

    /// Whether no further pass is needed.
    pub fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done(_))
    }

    /// Room for what one thread counts in the next pass.
    pub fn counters(&self) -> Counters {
        let searches = match &self.stage {
            Stage::Magnitudes(updates) => {
                updates.iter().flatten().map(|search| search.counts(self.layout)).collect()
            }
            Stage::Variance(search) => vec![search.counts(self.layout)],
            _ => Vec::new(),
        };
        let squares = match self.stage {
            Stage::Squares(_) => vec![0.0; self.weights.len() * self.layout.rows],
            _ => Vec::new(),
        };
        let gathered = match &self.stage {
            Stage::Ranks { next, updates } => {
                let elements = ranks::gathered(self.layout, *next).len() * self.layout.inputs();
                vec![vec![0.0; elements]; updates.len()]
            }
            _ => Vec::new(),
        };
        Counters { searches, spread: 0, squares, gathered, room: Vec::new() }
    }

    /// Counts a tile: the rows from `first_row` of every update.
    pub fn count(&self, counters: &mut Counters, first_row: usize, tile: &[&[f32]]) {
        let layout = self.layout;
        let room = &mut counters.room;
        match &self.stage {
            Stage::Magnitudes(updates) => {
                let bounds = updates.iter().zip(tile).flat_map(|(searches, values)| {
                    searches.iter().map(move |search| (search, *values))
                });
                for (counts, (search, values)) in counters.searches.iter_mut().zip(bounds) {
                    counts.add(search, layout, first_row, values);
                }
            }
            Stage::Spread => {
                deviations(tile, self.missing, room);
                counters.spread += room.iter().filter(|value| **value != 0.0).count() as u64;
            }
            Stage::Variance(search) => {
                deviations(tile, self.missing, room);
                counters.searches[0].add(search, layout, first_row, room);
            }
            Stage::Squares(cut) => {
                deviations(tile, self.missing, room);
                for (row, places) in room.chunks_exact(layout.columns).enumerate() {
                    let stored = first_row + row;
                    for (column, deviation) in places.iter().enumerate() {
                        if !cut.takes(*deviation, || layout.place(stored, column)) {
                            continue;
                        }
                        for (update, values) in tile.iter().enumerate() {
                            let value = f64::from(values[row * layout.columns + column]);
                            counters.squares[update * layout.rows + stored] += value * value;
                        }
                    }
                }
            }
            Stage::Ranks { next, .. } => {
                let rows = ranks::gathered(layout, *next);
                for (target, values) in counters.gathered.iter_mut().zip(tile) {
                    ranks::gather(layout, &rows, first_row, values, target);
                }
            }
            Stage::Done(_) => {}
        }
    }

    /// Takes what all threads counted in a pass.
    ///
    /// # Panics
    /// If there is nothing.
    pub fn advance(&mut self, counters: Vec<Counters>) {
        let mut threads = counters.into_iter();
        let mut all = threads.next().expect("the counters of a thread");
        for other in threads {
            all.searches.iter_mut().zip(&other.searches).for_each(|(sum, one)| sum.join(one));
            all.spread += other.spread;
            // Each row was counted by one thread.
            all.squares.iter_mut().zip(&other.squares).for_each(|(sum, one)| *sum += one);
            let rows = all.gathered.iter_mut().flatten().zip(other.gathered.iter().flatten());
            rows.for_each(|(sum, one)| *sum += one);
        }
        let mut searches = all.searches.into_iter();
        match &mut self.stage {
            Stage::Magnitudes(updates) => {
                for (search, counts) in updates.iter_mut().flatten().zip(searches) {
                    search.advance(counts);
                }
            }
            Stage::Spread => {
                let Trim::Variance { share } = self.method.trim else { unreachable!("it is SCE") };
                let elements = self.layout.rows as u64 * self.layout.columns as u64;
                self.stage = Stage::Variance(Search::new(elements, part_of(share, all.spread)));
            }
            Stage::Variance(search) => search.advance(searches.next().expect("there is one")),
            Stage::Squares(cut) => {
                let cut = *cut;
                let rows = all.squares.chunks_exact(self.layout.rows.max(1));
                let squares: Vec<f64> = rows.map(|rows| rows.iter().sum()).collect();
                let sum: f64 = squares.iter().sum();
                self.weights = match sum > 0.0 {
                    true => squares.iter().map(|square| square / sum).collect(),
                    false => vec![0.0; squares.len()],
                };
                self.stage = Stage::Done(vec![Keep::Positions(cut); self.weights.len()]);
            }
            Stage::Ranks { next, updates } => {
                let (rows, mut order) = (ranks::gathered(self.layout, *next), Vec::new());
                for (ranks, gathered) in updates.iter_mut().zip(&all.gathered) {
                    ranks.set(rows.start, gathered, &mut order);
                }
                *next = rows.end;
            }
            Stage::Done(_) => {}
        }
        self.settle();
    }

    /// Goes on where no counts are needed.
    fn settle(&mut self) {
        match &mut self.stage {
            Stage::Ranks { next, updates } if *next >= self.layout.outputs() => {
                let Trim::Ranked { density, epsilon } = self.method.trim else {
                    unreachable!("it is DELLA")
                };
                let keeps = self.masks.iter().zip(std::mem::take(updates)).map(|(mask, ranks)| {
                    Keep::Known { mask: *mask, density, epsilon, ranks: Arc::new(ranks) }
                });
                self.stage = Stage::Done(keeps.collect());
            }
            Stage::Magnitudes(updates) if updates.iter().flatten().all(Search::is_done) => {
                let keep = |searches: &Vec<Search>| match searches.as_slice() {
                    [lower] => Keep::Largest(lower.cut()),
                    [upper, lower] => Keep::Middle { upper: upper.cut(), lower: lower.cut() },
                    _ => unreachable!("there are one or two bounds"),
                };
                self.stage = Stage::Done(updates.iter().map(keep).collect());
            }
            Stage::Variance(search) if search.is_done() => {
                self.stage = Stage::Squares(search.cut())
            }
            _ => {}
        }
    }

    /// What was found.
    ///
    /// # Panics
    /// If it is not done.
    pub fn selection(self) -> Selection {
        let Stage::Done(keeps) = self.stage else { panic!("a pass is missing") };
        let Method { join, lambda, .. } = self.method;
        debug_assert!(join != Join::Energies || self.weights.len() == keeps.len());
        debug_assert!(self.masks.is_empty() || self.masks.len() == self.weights.len());
        Selection {
            keeps,
            join,
            lambda,
            weights: self.weights,
            layout: self.layout,
            missing: self.missing,
        }
    }

    /// The whole, of updates in memory.
    pub fn of(mut self, updates: &[&[f32]]) -> Selection {
        while !self.is_done() {
            let mut counters = self.counters();
            self.count(&mut counters, 0, updates);
            self.advance(vec![counters]);
        }
        self.selection()
    }
}
