//! The modules of several adapters, brought together: for each, what every adapter adds to it.

use indexmap::IndexMap;

use super::dense::Dense;
use crate::adapter::alignment::{Alignment, Identity, Layout, Unit};
use crate::adapter::{Adapter, Grammar, Initialization, LayerKind, Module};
use crate::error::{Error, Result};
use crate::measure::products::{Factors, PartFactors, Product, products_of};
use crate::measure::spectrum::Update;
use crate::parallel::task::Task;

/// What one adapter adds to a module: one of its products, or a part of one.
#[derive(Debug, Clone)]
pub(crate) struct Part<'a> {
    /// The adapter's place among all.
    pub adapter: usize,
    product: Product<'a>,
    unit: Unit,
}

/// A module, and what adapters add to it.
#[derive(Debug)]
pub(crate) struct Sum<'a> {
    /// The module as the result has it, of the first adapter that has it whole.
    pub module: &'a Module,
    /// (outputs, inputs).
    pub shape: [usize; 2],
    /// At most one for each adapter.
    pub parts: Vec<Part<'a>>,
}

/// What an adapter may have beside products of two factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowed {
    /// What is kept as it is: DoRA's magnitudes of the outputs, norms and biases, parameters that were
    /// trained whole and trained rows.
    pub kept: bool,
    /// Factors that began with a part of the base's weight.
    pub initialization: bool,
    /// Parameters that were trained whole and trained rows, which are computed apart.
    pub saved: bool,
}

impl Allowed {
    /// Nothing, where several adapters are summed.
    pub const NOTHING: Self = Self { kept: false, initialization: false, saved: false };
    /// What one adapter keeps.
    pub const OF_ONE: Self = Self { kept: true, initialization: false, saved: true };
}

/// The adapters' modules, and the adapter whose names they have.
#[derive(Debug)]
pub(crate) struct Sums<'a> {
    pub modules: Vec<Sum<'a>>,
    /// The modules that the result has as they are.
    pub kept: Vec<&'a Module>,
    /// The place of the adapter whose names the result takes.
    pub names: usize,
}

impl<'a> Sums<'a> {
    /// Brings the modules of adapters together.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for adapters of different models, and for updates that are no sums of
    /// products, each named; [`Error::Argument`] for shapes that differ.
    pub fn of(adapters: &'a [Adapter], allowed: Allowed, task: &Task) -> Result<Self> {
        for adapter in adapters {
            refuse_what_is_no_product(adapter, allowed)?;
        }
        let layouts: Vec<Layout> = adapters.iter().map(Layout::of).collect();
        let alignment = Alignment::of(&layouts.iter().collect::<Vec<_>>(), task)?;
        for index in 1..adapters.len() {
            // Without modules there is nothing to bring together: the base names parameters.
            if adapters[0].modules().is_empty() || adapters[index].modules().is_empty() {
                continue;
            }
            if let Some(reason) = alignment.reason(0, index) {
                return Err(Error::unsupported(
                    adapters[index].path(),
                    format!(
                        "changes another model than {} does: {reason}",
                        adapters[0].path().display()
                    ),
                ));
            }
        }
        // Names with dots say more than flattened ones.
        let names = adapters.iter().position(|one| one.grammar() == Grammar::Dotted).unwrap_or(0);
        let order = [names].into_iter().chain((0..adapters.len()).filter(|index| *index != names));
        let mut found = IndexMap::<&Identity, Vec<Part<'a>>>::new();
        let members = &alignment.members;
        let products: Vec<Vec<Product<'a>>> = adapters.iter().map(products_of).collect();
        for adapter in order {
            for unit in &members[adapter].units {
                let product = products[adapter][unit.part];
                if is_vector(product.module) {
                    continue;
                }
                let part = Part { adapter, product, unit: unit.clone() };
                found.entry(&unit.identity).or_default().push(part);
            }
        }
        let sums = found.into_values().map(|parts| Sum::of(parts, adapters));
        let kept = adapters.iter().flat_map(|adapter| adapter.modules().values());
        let kept = kept.filter(|module| is_vector(module)).collect();
        Ok(Self { modules: sums.collect::<Result<_>>()?, kept, names })
    }
}

impl<'a> Sum<'a> {
    fn of(mut parts: Vec<Part<'a>>, adapters: &[Adapter]) -> Result<Self> {
        let path = |part: &Part<'_>| adapters[part.adapter].path();
        let first = &parts[0];
        // An embedding's product says what the layer is; another does not.
        let of_embedding = |part: &&Part<'_>| part.product.module.kind == LayerKind::Embedding;
        let whole = || parts.iter().filter(|part| part.is_whole());
        let Some(whole) = whole().find(of_embedding).or_else(|| whole().next()) else {
            return Err(Error::unsupported(
                path(first),
                format!(
                    "holds the factors of several layers for {} together, and a sum of such is not \
                     known how to write",
                    first.product.module.title()
                ),
            ));
        };
        let (module, shape) = (whole.product.module, whole.unit.shape);
        let path_of_whole = path(whole);
        for part in &mut parts {
            part.turn_to(module.kind);
        }
        if let Some(other) = parts.iter().find(|part| part.unit.shape != shape) {
            let [rows, columns] = other.unit.shape;
            return Err(Error::adapter(
                path(other),
                format!(
                    "adds a {rows}×{columns} product to {}, to which {} adds one of {}×{}: they \
                     belong to different models",
                    other.product.module.title(),
                    path_of_whole.display(),
                    shape[0],
                    shape[1]
                ),
            ));
        }
        parts.sort_by_key(|part| part.adapter);
        if let Some(twice) = parts.windows(2).find(|pair| pair[0].adapter == pair[1].adapter) {
            return Err(Error::unsupported(
                path(&twice[0]),
                format!("changes {} by several of its modules", module.title()),
            ));
        }
        Ok(Self { module, shape: shape.map(|extent| extent as usize), parts })
    }

    /// What is added by an adapter, if it has the module.
    pub fn part_of(&self, adapter: usize) -> Option<&Part<'a>> {
        self.parts.iter().find(|part| part.adapter == adapter)
    }

    /// What it is called in messages and reports.
    pub fn name(&self) -> String {
        self.module.title().into_owned()
    }

    /// Bytes of all factors, or in f32 of what has none.
    pub fn bytes(&self) -> u64 {
        let whole = (self.shape[0] * self.shape[1] * size_of::<f32>()) as u64;
        let bytes = |part: &Part<'_>| match part.product.bytes() {
            0 => whole,
            bytes => bytes,
        };
        self.parts.iter().map(bytes).sum()
    }
}

impl<'a> Part<'a> {
    /// The module of the adapter.
    pub fn module(&self) -> &'a Module {
        self.product.module
    }

    /// The rank of its product.
    pub fn rank(&self) -> usize {
        self.product.extents().2
    }

    /// Whether it is all that its module adds, as it stands.
    pub fn is_whole(&self) -> bool {
        self.unit.outputs.is_none() && self.product.expert.is_none() && !self.unit.is_transposed
    }

    /// Turns it as a layer of that kind has it: what is added to an embedding like to a linear layer, or
    /// to its parameter, is the transpose of an embedding's product.
    fn turn_to(&mut self, kind: LayerKind) {
        let is_embedding = |kind| kind == LayerKind::Embedding;
        if is_embedding(kind) != is_embedding(self.product.module.kind) {
            self.unit.is_transposed ^= true;
            self.unit.shape.reverse();
        }
    }

    /// What it is of its module's whole matrix.
    pub fn of_whole(&self, whole: Dense) -> Dense {
        let whole = if self.unit.is_transposed { whole.transposed() } else { whole };
        match &self.unit.outputs {
            Some(outputs) => whole.part(outputs.start as usize..outputs.end as usize),
            None => whole,
        }
    }

    /// Its factors in numbers.
    ///
    /// # Errors
    /// [`Error::Adapter`] if a file changed meanwhile, [`Error::Io`].
    pub fn read(&self) -> Result<ReadPart> {
        let mut room = Vec::new();
        let module = self.product.module;
        let read = self.product.read(&mut room)?;
        // The result's module has the same place, and is added as often.
        let repeats = module.repeats();
        if self.unit.outputs.is_none() && !self.unit.is_transposed {
            return Ok(ReadPart { factors: Read::Whole(read.into_owned()), repeats });
        }
        let part = read.part(self.unit.is_transposed, self.unit.outputs.as_ref())?;
        Ok(ReadPart { factors: Read::Part(part), repeats })
    }
}

/// The factors of a part, read.
pub(crate) struct ReadPart {
    factors: Read,
    repeats: f64,
}

enum Read {
    Whole(Factors<'static>),
    Part(PartFactors),
}

impl ReadPart {
    /// The update that they make.
    ///
    /// # Errors
    /// [`Error::Argument`] never: the shapes are those of the tensors.
    pub fn update(&self) -> Result<Update<'_>> {
        let update = match &self.factors {
            Read::Whole(factors) => factors.update(),
            Read::Part(factors) => factors.update(),
        };
        Ok(update?.scaled(1.0 / self.repeats))
    }
}

/// Whether a module adds a vector.
fn is_vector(module: &Module) -> bool {
    matches!(module.kind, LayerKind::Norm | LayerKind::Bias)
}

/// Refuses an adapter of which some part is no product of two factors that stands by itself.
///
/// # Errors
/// [`Error::Unsupported`] with all such parts.
pub(crate) fn refuse_what_is_no_product(adapter: &Adapter, allowed: Allowed) -> Result<()> {
    let mut found = adapter.obstacles(&[]);
    let mut say = |what: &str, names: Vec<String>| match names.as_slice() {
        [] => {}
        [only] => found.push(format!("has {what} ({only})")),
        [first, ..] => found.push(format!("has {what} ({first} and {} more)", names.len() - 1)),
    };
    let modules = |is: &dyn Fn(&Module) -> bool| -> Vec<String> {
        let found = adapter.modules().values().filter(|module| is(module));
        found.map(|module| module.title().into_owned()).collect()
    };
    let is_kept = |is: bool| is && allowed.kept;
    say(
        "DoRA's magnitudes, with which the update is no sum; the base makes one of it: give it to combine \
         (base=, --base), or make the adapter plain first (lorafast.bake with plain and base)",
        modules(&|module| module.magnitudes().is_some() && !is_kept(module.magnitude.is_some())),
    );
    say(
        "updates that only the base's weight makes; make them plain with it first (lorafast.bake with \
         plain and base)",
        modules(&|module| !module.delta.has_product() || module.delta.transform().is_some()),
    );
    say("updates of norms and biases", modules(&|module| is_vector(module) && !allowed.kept));
    say("the factors of several experts together", modules(&|module| module.delta.holds_experts()));
    if !allowed.saved {
        let saved = adapter.saved().iter().map(|saved| saved.path.clone()).collect();
        say(
            "parameters that were trained whole, whose change the base tells (base=, --base)",
            saved,
        );
        let rows = adapter.trained_rows().iter().map(|rows| rows.path.clone()).collect();
        say("trained rows of embeddings, whose change the base tells (base=, --base)", rows);
    }
    let semantics = adapter.semantics();
    if semantics.initialization != Initialization::Plain && !allowed.initialization {
        found.push(
            "has factors that began with a part of the base's weight (PiSSA, OLoRA or the like); make \
             them plain with the base first (lorafast.bake with plain and base)"
                .to_owned(),
        );
    }
    if let Some(order) = &semantics.unknown_order {
        found.push(format!("has rows in {order}, which the base tells (base=, --base)"));
    }
    match found.is_empty() {
        true => Ok(()),
        false => Err(Error::unsupported(
            adapter.path(),
            format!("cannot be computed with: it {}", found.join("; ")),
        )),
    }
}
