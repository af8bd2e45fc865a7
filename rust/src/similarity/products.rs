//! All inner products of many updates: by module K = blocksum((𝐁ᵀ𝐁)∘(𝐀𝐀ᵀ)) over stacked factors.
//!
//! The work is cut twice. A *block* is the products of one run of tiles with another; it goes
//! through all modules, is written down in between, and can be resumed there. Within a block, each
//! pair of tiles of each module is a unit of work for a thread. Memory is that of the stacked
//! factors of a block's modules in work, and the N×N result. Every number is made by the same
//! operations in the same order, whatever the threads, the memory, or the interruptions.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::cache::{self, Cache};
use super::collection::Collection;
use super::load::Real;
use super::tiles::{Scratch, Stack, Tile, cut};
use crate::error::{Error, Result};
use crate::parallel::task::Task;

/// Ranks of one side of a block, where the memory allows: enough that reading the factors again
/// for each block is a few percent of the work on them.
const BLOCK_RANKS: usize = 4096;
/// What an interruption may cost.
const SAVE_EVERY: Duration = Duration::from_secs(5);

/// What the products of factors are summed in. Everything after that, and all norms, are f64.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// f64: cosines to 1e-13 and better.
    Double,
    /// f32: cosines to about 1e-7, at twice the speed.
    Single,
}

impl Precision {
    /// From `float64` or `float32`.
    ///
    /// # Errors
    /// [`Error::Argument`] for another name.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "float64" => Ok(Self::Double),
            "float32" => Ok(Self::Single),
            _ => {
                Err(Error::Argument(format!("precision must be float64 or float32, not {name:?}")))
            }
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Double => 8,
            Self::Single => 4,
        }
    }
}

/// How products are made.
#[derive(Debug, Clone)]
pub struct Options {
    /// What the products are summed in.
    pub precision: Precision,
    /// Whether to keep those of each module.
    pub per_module: bool,
    /// Bytes for stacked factors. The smallest amount that works is that of two tiles.
    pub memory: usize,
    /// A directory where what is done is written down, and found again.
    pub cache: Option<PathBuf>,
}

/// Inner products, row after row.
#[derive(Debug, Clone)]
pub struct Products {
    /// N: the members of the collection.
    pub count: usize,
    /// N×N, of the whole updates; NaN for pairs that are in no group together.
    pub all: Vec<f64>,
    /// For each module N×N, in the order of the collection's modules, where it was asked for.
    pub modules: Vec<Vec<f64>>,
    /// Blocks that were found in the cache as a whole.
    pub found: usize,
    /// Why nothing more was written to the cache, where that failed.
    pub unsaved: Option<String>,
    /// Where the time went.
    pub times: Times,
}

/// Time of the clock that the parts of the products took, on all threads together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Times {
    /// Factors read, widened and stacked, and the squares of each.
    pub reading: Duration,
    /// Stacked factors multiplied, and the sums over blocks.
    pub multiplying: Duration,
}

/// Multiplications (each with an addition) of the products within a group.
pub fn work(collection: &Collection, groups: &[Vec<usize>]) -> u64 {
    let plans = groups.iter().flat_map(|group| plan(collection, group, usize::MAX));
    plans.map(|block| block.work(collection)).fold(0, u64::saturating_add)
}

/// The inner products of the members of each group with each other, on the given threads. Progress
/// is counted in multiplications.
///
/// # Errors
/// [`Error::Adapter`] for a file that was changed meanwhile, [`Error::Io`], [`Error::Cancelled`].
///
/// # Panics
/// If a group names a member that is not there.
pub fn products(
    collection: &Collection,
    groups: &[Vec<usize>],
    options: &Options,
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Products> {
    let count = collection.members.len();
    let tables = if options.per_module { collection.modules.len() } else { 0 };
    let mut result = Products {
        count,
        all: vec![f64::NAN; count * count],
        modules: vec![vec![f64::NAN; count * count]; tables],
        found: 0,
        unsaved: None,
        times: Times::default(),
    };
    let blocks = plan_all(collection, groups, options, BLOCK_RANKS);
    task.expect(blocks.iter().map(|block| block.work(collection)).sum());
    let open = |directory: &PathBuf| Cache::open(directory, collection, &blocks, options);
    let cache = options.cache.as_ref().map(open).transpose()?;
    for (index, block) in blocks.iter().enumerate() {
        let unsaved = &mut result.unsaved;
        let mut run =
            Run { collection, block, options, cache: cache.as_ref(), index, unsaved, task };
        let table = match options.precision {
            Precision::Double => run.carry_out::<f64>(pool, &mut result.times),
            Precision::Single => run.carry_out::<f32>(pool, &mut result.times),
        }?;
        result.found += usize::from(table.was_found);
        block.spread(&table.all, count, &mut result.all);
        for (module, values) in table.modules.iter().enumerate() {
            block.spread(values, count, &mut result.modules[module]);
        }
    }
    Ok(result)
}

/// The blocks of all groups, of at most so many ranks on a side.
fn plan_all(
    collection: &Collection,
    groups: &[Vec<usize>],
    options: &Options,
    most_ranks: usize,
) -> Vec<Block> {
    let longest = collection.modules.iter().map(|m| m.rows + m.columns).max().unwrap_or(1);
    let most = options.memory / (2 * longest * options.precision.size());
    groups.iter().flat_map(|group| plan(collection, group, most.min(most_ranks))).collect()
}

/// A block as whoever shares blocks out sees it.
#[derive(Debug, Clone)]
pub struct PlannedBlock {
    /// Multiplications.
    pub work: u64,
    /// The members of its rows and of its columns.
    pub members: [Vec<usize>; 2],
}

/// The blocks of some groups, of at most so many ranks on a side, and a digest of what they are of
/// and how they are made.
pub fn blocks(
    collection: &Collection,
    groups: &[Vec<usize>],
    options: &Options,
    most_ranks: usize,
) -> (String, Vec<PlannedBlock>) {
    let blocks = plan_all(collection, groups, options, most_ranks);
    let digest = cache::digest_of(collection, &blocks, options);
    let planned = |block: &Block| PlannedBlock {
        work: block.work(collection),
        members: block.members().map(<[usize]>::to_vec),
    };
    (digest, blocks.iter().map(planned).collect())
}

/// The products of one of [`blocks`], as [`products`] makes them: of all, and of each module where
/// it was asked for, row after row. Of a block with itself those below the diagonal are zero.
///
/// # Errors
/// [`Error::Adapter`] for a file that was changed meanwhile or since the digest was made,
/// [`Error::Io`], [`Error::Cancelled`].
pub fn block_products(
    collection: &Collection,
    groups: &[Vec<usize>],
    (index, digest): (usize, &str),
    options: &Options,
    most_ranks: usize,
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let blocks = plan_all(collection, groups, options, most_ranks);
    let own = cache::digest_of(collection, &blocks, options);
    let Some(block) = blocks.get(index).filter(|_| own == digest) else {
        return Err(Error::Plan(vec![
            "the adapters, or lorafast, are not those that the comparison was planned with"
                .to_owned(),
        ]));
    };
    task.expect(block.work(collection));
    let mut unsaved = None;
    let mut times = Times::default();
    let mut run =
        Run { collection, block, options, cache: None, index, unsaved: &mut unsaved, task };
    let table = match options.precision {
        Precision::Double => run.carry_out::<f64>(pool, &mut times),
        Precision::Single => run.carry_out::<f32>(pool, &mut times),
    }?;
    Ok((table.all, table.modules))
}

/// The products of the members of some tiles with those of others, or with each other.
pub(super) struct Block {
    /// The group's members.
    order: Vec<usize>,
    rows: Vec<Tile>,
    columns: Vec<Tile>,
}

/// The blocks of one group: runs of tiles of at most so many ranks, each with itself and those
/// after it.
fn plan(collection: &Collection, group: &[usize], most_ranks: usize) -> Vec<Block> {
    let mut runs: Vec<Vec<Tile>> = Vec::new();
    let mut ranks = 0;
    for tile in cut(collection, group) {
        match runs.last_mut() {
            Some(run) if ranks + tile.ranks <= most_ranks => {
                ranks += tile.ranks;
                run.push(tile);
            }
            _ => {
                ranks = tile.ranks;
                runs.push(vec![tile]);
            }
        }
    }
    let pairs = (0..runs.len()).flat_map(|row| (row..runs.len()).map(move |column| (row, column)));
    pairs
        .map(|(row, column)| Block {
            order: group.to_vec(),
            rows: runs[row].clone(),
            columns: runs[column].clone(),
        })
        .collect()
}

impl Block {
    /// All of a group at once.
    #[cfg(test)]
    pub fn whole(collection: &Collection, group: &[usize]) -> Self {
        plan(collection, group, usize::MAX).remove(0)
    }

    fn is_diagonal(&self) -> bool {
        self.rows == self.columns
    }

    /// The positions of one side's members in the group.
    fn span(tiles: &[Tile]) -> Range<usize> {
        tiles[0].start..tiles[tiles.len() - 1].end
    }

    pub fn height(&self) -> usize {
        Self::span(&self.rows).len()
    }

    pub fn width(&self) -> usize {
        Self::span(&self.columns).len()
    }

    /// The members of both sides, for the cache's name of the block.
    pub fn members(&self) -> [&[usize]; 2] {
        [&self.order[Self::span(&self.rows)], &self.order[Self::span(&self.columns)]]
    }

    fn tile_members(&self, tile: &Tile) -> &[usize] {
        &self.order[tile.start..tile.end]
    }

    /// Tiles to read: those of the rows, and those of the columns where they are others.
    fn tiles(&self) -> Vec<&Tile> {
        let columns = if self.is_diagonal() { &[] } else { &self.columns[..] };
        self.rows.iter().chain(columns).collect()
    }

    /// Pairs of tiles to multiply, as positions in [`Block::tiles`].
    fn pairs(&self) -> Vec<(usize, usize)> {
        let (rows, columns) = (self.rows.len(), self.columns.len());
        if self.is_diagonal() {
            (0..rows).flat_map(|row| (row..rows).map(move |column| (row, column))).collect()
        } else {
            let column = |column| rows + column;
            (0..rows).flat_map(|row| (0..columns).map(move |c| (row, column(c)))).collect()
        }
    }

    /// The rank of a module in the members of each tile.
    fn ranks(&self, collection: &Collection, module: usize) -> Vec<u64> {
        let rank = |member: &usize| {
            collection.members[*member].piece(module).map_or(0, |piece| piece.rank as u64)
        };
        self.tiles().iter().map(|tile| self.tile_members(tile).iter().map(rank).sum()).collect()
    }

    fn module_work(&self, collection: &Collection, module: usize) -> u64 {
        let info = &collection.modules[module];
        let ranks = self.ranks(collection, module);
        let products: u64 =
            self.pairs().iter().map(|(row, column)| ranks[*row] * ranks[*column]).sum();
        products * (info.rows + info.columns) as u64
    }

    fn work(&self, collection: &Collection) -> u64 {
        (0..collection.modules.len()).map(|module| self.module_work(collection, module)).sum()
    }

    /// Bytes of the stacked factors of a module, and of the results of its pairs of tiles.
    fn bytes(&self, collection: &Collection, module: usize, precision: Precision) -> usize {
        let info = &collection.modules[module];
        let ranks: u64 = self.ranks(collection, module).iter().sum();
        let tiles = self.tiles();
        let results: usize =
            self.pairs().iter().map(|(row, column)| tiles[*row].len() * tiles[*column].len()).sum();
        ranks as usize * (info.rows + info.columns) * precision.size() + results * 8
    }

    /// Puts a table of the block into one of all members, on both sides of the diagonal.
    fn spread(&self, table: &[f64], count: usize, target: &mut [f64]) {
        let [rows, columns] = self.members();
        for (row, line) in rows.iter().zip(table.chunks_exact(columns.len())) {
            for (column, value) in columns.iter().zip(line) {
                // Of a block with itself, what lies below the diagonal was never made.
                if !self.is_diagonal() || row <= column {
                    target[row * count + column] = *value;
                    target[column * count + row] = *value;
                }
            }
        }
    }
}

/// What is done of a block.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Table {
    /// The modules that are in it: those before this one.
    pub next: usize,
    pub all: Vec<f64>,
    pub modules: Vec<Vec<f64>>,
    pub was_found: bool,
}

struct Run<'a> {
    collection: &'a Collection,
    block: &'a Block,
    options: &'a Options,
    cache: Option<&'a Cache>,
    index: usize,
    /// Why the cache is written to no more.
    unsaved: &'a mut Option<String>,
    task: &'a Task,
}

impl Run<'_> {
    fn carry_out<T: Real>(&mut self, pool: &rayon::ThreadPool, times: &mut Times) -> Result<Table> {
        let count = self.collection.modules.len();
        let size = self.block.height() * self.block.width();
        let found = self.cache.and_then(|cache| cache.find(self.index, self.block, count));
        let mut table = match found {
            Some(found) => found,
            None => Table { all: vec![0.0; size], ..Table::default() },
        };
        table.was_found = table.next == count;
        let before = |module| self.block.module_work(self.collection, module);
        self.task.advance((0..table.next).map(before).sum());
        let (mut saved, mut pause) = (Instant::now(), SAVE_EVERY);
        while table.next < count {
            let batch = self.batch(table.next);
            let begin = Instant::now();
            let stacks = pool.install(|| self.read::<T>(batch.clone()))?;
            let read = Instant::now();
            let results = pool.install(|| self.multiply(batch.clone(), &stacks))?;
            times.reading += read - begin;
            times.multiplying += read.elapsed();
            for parts in results {
                let mut own = vec![0.0; size];
                for (place, part) in parts {
                    self.block.place(place, &part, &mut own);
                }
                // Module after module, so that the sum does not depend on the batches.
                for (sum, value) in table.all.iter_mut().zip(&own) {
                    *sum += value;
                }
                if self.options.per_module {
                    table.modules.push(own);
                }
            }
            table.next = batch.end;
            if let Some(cache) = self.cache
                && self.unsaved.is_none()
                && (table.next == count || saved.elapsed() > pause)
            {
                let begin = Instant::now();
                // What the cache cannot do costs no work that is done.
                *self.unsaved = cache.save(self.index, &table).err().map(|error| error.to_string());
                saved = Instant::now();
                // Tables of each module are large; writing them must not become the work.
                pause = SAVE_EVERY.max(20 * begin.elapsed());
            }
        }
        Ok(table)
    }

    /// As many modules as the memory allows, from this one on.
    fn batch(&self, first: usize) -> Range<usize> {
        let bytes = |module| self.block.bytes(self.collection, module, self.options.precision);
        let mut total = bytes(first);
        let mut end = first + 1;
        while end < self.collection.modules.len() && total + bytes(end) <= self.options.memory {
            total += bytes(end);
            end += 1;
        }
        first..end
    }

    /// The factors of some modules: for each module those of each tile.
    fn read<T: Real>(&self, batch: Range<usize>) -> Result<Vec<Stack<T>>> {
        let tiles = self.block.tiles();
        let wanted: Vec<(usize, &Tile)> =
            batch.flat_map(|module| tiles.iter().map(move |tile| (module, *tile))).collect();
        wanted
            .par_iter()
            .map(|(module, tile)| {
                self.task.check()?;
                let members = self.block.tile_members(tile);
                Stack::read(self.collection, members, *module, self.block.is_diagonal())
            })
            .collect()
    }

    /// The products of some modules: for each module those of each pair of tiles.
    fn multiply<T: Real>(
        &self,
        batch: Range<usize>,
        stacks: &[Stack<T>],
    ) -> Result<Vec<Vec<PartResult>>> {
        let tiles = self.block.tiles();
        let pairs = self.block.pairs();
        let units: Vec<(usize, (usize, usize))> = batch
            .clone()
            .flat_map(|module| pairs.iter().map(move |pair| (module, *pair)))
            .collect();
        // One for each thread at most: it is put back when a pair is done.
        let scratches = Mutex::new(Vec::<Scratch<T>>::new());
        let results: Vec<PartResult> = units
            .par_iter()
            .map(|(module, (row, column))| {
                self.task.check()?;
                let first = (module - batch.start) * tiles.len();
                let (left, right) = (&stacks[first + row], &stacks[first + column]);
                let lock = || scratches.lock().unwrap_or_else(PoisonError::into_inner);
                let mut scratch = lock().pop().unwrap_or_default();
                let table = self.pair((row, column), left, right, &mut scratch, &tiles);
                lock().push(scratch);
                self.task.advance(left.work(right));
                Ok(((*row, *column), table))
            })
            .collect::<Result<_>>()?;
        let mut results = results.into_iter();
        Ok(batch.map(|_| results.by_ref().take(pairs.len()).collect()).collect())
    }

    fn pair<T: Real>(
        &self,
        (row, column): (&usize, &usize),
        left: &Stack<T>,
        right: &Stack<T>,
        scratch: &mut Scratch<T>,
        tiles: &[&Tile],
    ) -> Vec<f64> {
        if left.is_empty() || right.is_empty() {
            return Vec::new();
        }
        let width = tiles[*column].len();
        let mut table = vec![0.0; tiles[*row].len() * width];
        left.add_products(right, scratch, width, &mut table);
        table
    }
}

/// A pair of tiles, and the products of its members; of none, where a module is in neither.
type PartResult = ((usize, usize), Vec<f64>);

impl Block {
    /// Puts the products of a pair of tiles into the block's table.
    fn place(&self, (row, column): (usize, usize), part: &[f64], table: &mut [f64]) {
        if part.is_empty() {
            return;
        }
        let tiles = self.tiles();
        let (rows, columns) = (tiles[row], tiles[column]);
        let first_row = rows.start - Self::span(&self.rows).start;
        let first_column = columns.start - Self::span(&self.columns).start;
        for (line, values) in part.chunks_exact(columns.len()).enumerate() {
            let start = (first_row + line) * self.width() + first_column;
            table[start..start + values.len()].copy_from_slice(values);
        }
    }
}
