//! Collections of adapters, none of them open: where the factors of each lie.

use std::collections::HashSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use indexmap::IndexMap;
use rayon::prelude::*;
use serde::Serialize;

use crate::adapter::alignment::{Alignment, Identity, Layout, MemberNames, Part, Unit};
use crate::adapter::format::AdapterSource;
use crate::adapter::{Adapter, Expert, Initialization, Module};
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::digest::sha256_of_bytes;
use crate::storage::local::{self, File, Stamp};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Tensor, TensorFile};

/// A module that adapters update, told apart by the name that its family has for it, and by its
/// shape.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct ModuleInfo {
    /// Its path in the first adapter that has it; of a parameter that holds experts, with the
    /// expert's index.
    pub name: String,
    /// m, the outputs of ΔW.
    pub rows: usize,
    /// n, its inputs, a convolution's kernel included.
    pub columns: usize,
}

/// Where the bytes of a factor lie in its file.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub dtype: Dtype,
    pub offset: u64,
    pub length: usize,
}

/// How the factors of an update are found.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// As they stand in the file.
    Plain { a: Stored, b: Stored },
    /// They have to be put together from what the module of that key stores.
    Composed { key: String, expert: Option<Expert> },
}

/// One adapter's update of one module.
#[derive(Debug, Clone)]
pub(super) struct Piece {
    /// Position in [`Collection::modules`].
    pub module: usize,
    pub rank: usize,
    pub scale: f64,
    pub source: Source,
    /// Whether the product is transposed for it.
    pub is_transposed: bool,
    /// The outputs of the (transposed) product that it is; all, if none.
    pub outputs: Option<Range<usize>>,
}

/// What a member's factors are read from, at the positions that it remembers.
pub(super) enum Weights {
    /// Its file: the header was checked when the collection was opened.
    File(File),
    /// What was unpickled, or lies in several files.
    Memory(Arc<TensorFile>),
}

/// One adapter of a collection.
#[derive(Debug, Clone)]
pub struct Member {
    pub(super) source: AdapterSource,
    pub(super) file: PathBuf,
    /// Whether its weights are one file, which can be read by itself.
    pub(super) is_one_file: bool,
    pub(super) stamp: Stamp,
    pub(super) base: Option<String>,
    pub(super) pieces: Vec<Piece>,
    pub(super) left_out: Vec<String>,
    pub(super) names: Arc<MemberNames>,
    /// Changes with everything that the products depend on.
    pub(super) identity: String,
}

impl Member {
    /// The path that was given.
    pub fn path(&self) -> &Path {
        &self.source.path
    }

    /// The base that its config names.
    pub fn base(&self) -> Option<&str> {
        self.base.as_deref()
    }

    /// Bytes of its weights file.
    pub fn bytes(&self) -> u64 {
        self.stamp.length
    }

    /// The number of modules that it updates.
    pub fn modules(&self) -> usize {
        self.pieces.len()
    }

    /// The positions of those modules in [`Collection::modules`], ascending.
    pub fn module_positions(&self) -> Vec<usize> {
        self.pieces.iter().map(|piece| piece.module).collect()
    }

    /// The ranks that occur, ascending, each once.
    pub fn ranks(&self) -> Vec<usize> {
        let mut ranks: Vec<_> = self.pieces.iter().map(|piece| piece.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        ranks
    }

    /// The family of adapters that it can be compared with: whose modules have common names.
    pub fn family(&self) -> usize {
        self.names.family
    }

    /// What it does beside low-rank updates, in words.
    pub fn left_out(&self) -> &[String] {
        &self.left_out
    }

    pub(super) fn piece(&self, module: usize) -> Option<&Piece> {
        let found = self.pieces.binary_search_by_key(&module, |piece| piece.module);
        found.ok().map(|position| &self.pieces[position])
    }

    /// The adapter, opened again.
    pub(super) fn open(&self) -> Result<Adapter> {
        let adapter = self.source.open(&Task::new())?;
        // Another file may have come to the same name.
        if adapter.file().stamp() == self.stamp { Ok(adapter) } else { Err(self.changed()) }
    }

    /// What holds its weights, opened again.
    pub(super) fn open_weights(&self) -> Result<Weights> {
        if !self.is_one_file {
            return Ok(Weights::Memory(self.open()?.file().clone()));
        }
        let (file, metadata) = local::open(&self.file).map_err(|error| error.of(Owner::Adapter))?;
        if Stamp::of(&metadata) == self.stamp {
            Ok(Weights::File(file))
        } else {
            Err(self.changed())
        }
    }

    /// Looks again at the opened weights: an error if they are not what they were at first.
    pub(super) fn check_unchanged(&self, weights: &Weights) -> Result<()> {
        let Weights::File(file) = weights else { return Ok(()) };
        let metadata = local::metadata_of(file).map_err(|error| Error::io(&self.file, error))?;
        if Stamp::of(&metadata) == self.stamp { Ok(()) } else { Err(self.changed()) }
    }

    pub(super) fn changed(&self) -> Error {
        Owner::Adapter.changed(&self.file)
    }
}

/// Many adapters, none of them open.
#[derive(Debug, Clone, Default)]
pub struct Collection {
    pub(super) members: Vec<Member>,
    pub(super) modules: Vec<ModuleInfo>,
    /// What each module is told apart by, beside its shape.
    pub(super) identities: Vec<(usize, Identity)>,
    alignment: Alignment,
}

impl Collection {
    /// Opens each adapter for a moment, on the given threads, and remembers what is in it. Progress
    /// is counted in adapters. Returns the collection, and for each path that could not be read
    /// its position and why.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn open(
        sources: &[AdapterSource],
        pool: &rayon::ThreadPool,
        task: &Task,
    ) -> Result<(Self, Vec<(usize, Error)>)> {
        task.expect(sources.len() as u64);
        // Most of many adapters have the same layout.
        let layouts = Mutex::new(HashSet::new());
        let opened: Vec<Result<Opened>> = pool.install(|| {
            sources
                .par_iter()
                .map(|source| {
                    task.check()?;
                    let opened = Opened::read(source, &layouts, task);
                    task.advance(1);
                    opened
                })
                .collect()
        });
        task.check()?;
        let mut readable = Vec::new();
        let mut failures = Vec::new();
        for (position, opened) in opened.into_iter().enumerate() {
            match opened {
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => failures.push((position, error)),
                Ok(opened) => readable.push(opened),
            }
        }
        let layouts: Vec<&Layout> = readable.iter().map(|opened| &*opened.layout).collect();
        let alignment = Alignment::of(&layouts, task)?;
        let mut positions = IndexMap::<(usize, Identity, [u64; 2]), usize>::new();
        let mut members = Vec::with_capacity(readable.len());
        for (opened, names) in readable.into_iter().zip(&alignment.members) {
            let mut member = Member { names: Arc::clone(names), ..opened.member };
            let piece = |unit: &Unit| {
                let key = (names.family, unit.identity.clone(), unit.shape);
                let next = positions.len();
                let outputs = unit.outputs.clone();
                Piece {
                    module: *positions.entry(key).or_insert(next),
                    is_transposed: unit.is_transposed,
                    outputs: outputs.map(|rows| rows.start as usize..rows.end as usize),
                    ..opened.pieces[unit.part].clone()
                }
            };
            member.pieces = names.units.iter().map(piece).collect();
            member.pieces.sort_by_key(|piece| piece.module);
            members.push(member);
        }
        let (mut modules, mut identities) = (Vec::new(), Vec::new());
        for (family, identity, [rows, columns]) in positions.into_keys() {
            let (rows, columns) = (rows as usize, columns as usize);
            modules.push(ModuleInfo { name: alignment.label(family, &identity), rows, columns });
            identities.push((family, identity));
        }
        Ok((Self { members, modules, identities, alignment }, failures))
    }

    /// Why two members are not comparable, in words; `None` where they are.
    pub fn reason_apart(&self, x: usize, y: usize) -> Option<&str> {
        self.alignment.reason(x, y)
    }

    /// The adapters that could be read, in the order given.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Every module that any of them updates.
    pub fn modules(&self) -> &[ModuleInfo] {
        &self.modules
    }
}

/// One adapter as it is first met.
struct Opened {
    member: Member,
    layout: Arc<Layout>,
    /// The products of the layout's parts.
    pieces: Vec<Piece>,
}

impl Opened {
    fn read(
        source: &AdapterSource,
        layouts: &Mutex<HashSet<Arc<Layout>>>,
        task: &Task,
    ) -> Result<Self> {
        let adapter = source.open(task)?;
        let file = adapter.file().path().to_path_buf();
        let stamp = adapter.file().stamp();
        let layout = shared(layouts, Layout::of(&adapter));
        let piece = |part: &Part| {
            let module = &adapter.modules()[&part.key];
            Piece {
                module: 0,
                rank: module.product_rank(module.rank) as usize,
                scale: module.scaling * module.repeats(),
                source: source_of(&part.key, module, part.expert),
                is_transposed: false,
                outputs: None,
            }
        };
        let pieces = layout.parts.iter().map(piece).collect();
        let identity = identity_of(&adapter, source, stamp)?;
        adapter.check_unchanged()?;
        let member = Member {
            source: source.clone(),
            file,
            is_one_file: adapter.file().source().as_file().is_some(),
            stamp,
            base: adapter.semantics().base.clone(),
            pieces: Vec::new(),
            left_out: left_out(&adapter),
            names: Arc::default(),
            identity,
        };
        Ok(Self { member, layout, pieces })
    }
}

/// The layout among these that is the same.
fn shared(layouts: &Mutex<HashSet<Arc<Layout>>>, layout: Layout) -> Arc<Layout> {
    let mut known = layouts.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(same) = known.get(&layout) {
        return Arc::clone(same);
    }
    let layout = Arc::new(layout);
    known.insert(Arc::clone(&layout));
    layout
}

fn source_of(key: &str, module: &Module, expert: Option<Expert>) -> Source {
    let stored = |tensor: &Tensor| Stored {
        dtype: tensor.dtype.clone(),
        offset: tensor.offset(),
        length: tensor.bytes() as usize,
    };
    match module.delta.plain() {
        Some((a, b)) => Source::Plain { a: stored(a), b: stored(b) },
        None => Source::Composed { key: key.to_owned(), expert },
    }
}

/// What an adapter does beside low-rank updates.
fn left_out(adapter: &Adapter) -> Vec<String> {
    let mut parts = Vec::new();
    let mut say = |count: usize, what: &str| {
        if count > 0 {
            parts.push(format!("{count} {what}{}", if count == 1 { "" } else { "s" }));
        }
    };
    let modules = || adapter.modules().values();
    say(modules().filter(|module| module.magnitudes().is_some()).count(), "DoRA magnitude");
    say(modules().filter(|module| module.bias.is_some()).count(), "bias vector");
    let without = modules().filter(|module| !module.delta.has_product()).count();
    say(without, "GLoRA, IA3 or orthogonal module");
    say(adapter.trained_rows().len(), "embedding of trained rows");
    say(adapter.saved().len(), "parameter saved whole");
    if adapter.semantics().initialization != Initialization::Plain {
        parts.push("what its start took out of the base's weights".to_owned());
    }
    parts
}

/// A digest of what the products depend on: the file's state and the scales.
fn identity_of(adapter: &Adapter, source: &AdapterSource, stamp: Stamp) -> Result<String> {
    use std::fmt::Write;
    let mut text = format!("{}\n", adapter.path().display());
    if source.pickle.is_none() {
        // Without the device, whose number a file system can change when it is mounted again.
        let Stamp { length, modified, identity: (_, inode) } = stamp;
        let _ = writeln!(text, "{length} {modified} {inode}");
    } else {
        // What was unpickled has no place of its own; its bytes tell it.
        let _ = writeln!(text, "{}", adapter.sha256()?);
    }
    for (key, module) in adapter.modules() {
        let _ = writeln!(text, "{key} {:e} {}", module.scaling, module.delta.form());
    }
    Ok(sha256_of_bytes(text.as_bytes()))
}
