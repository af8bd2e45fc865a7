//! The modules of several adapters, brought together: for each, what every adapter adds to it.

use indexmap::IndexMap;

use super::dense::Dense;
use super::stacks;
use crate::adapter::alignment::{Alignment, Identity, Layout, Unit};
use crate::adapter::{
    Adapter, Expert, Grammar, Initialization, LayerKind, Module, TransposedExperts,
};
use crate::checkpoint::Checkpoint;
use crate::convert;
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
    /// Which of the module's experts it is, where that holds a matrix for each.
    pub expert: Option<Expert>,
    /// (outputs, inputs).
    pub shape: [usize; 2],
    /// The layer that it changes, by what all of them know of it.
    pub layer: Layer,
    /// At most one for each adapter.
    pub parts: Vec<Part<'a>>,
}

/// What a sum's layer is, as its factors are written.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    /// What layer it is.
    pub kind: LayerKind,
    /// The extents of the inputs, a convolution's kernel among them.
    pub inputs: Vec<u64>,
    /// Whether the factors are written transposed: an embedding's product is the transpose of its weight,
    /// which some formats have as it is.
    pub turns: bool,
}

/// What an adapter may have beside products of two factors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Allowed {
    /// What is kept as it is: DoRA's magnitudes of the outputs, norms and biases (which are summed
    /// otherwise), parameters that were trained whole and trained rows.
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
    /// Norms and biases that are summed.
    pub vectors: Vec<Sum<'a>>,
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
        let mut of_vectors = IndexMap::<&Identity, Vec<Part<'a>>>::new();
        let members = &alignment.members;
        let products: Vec<Vec<Product<'a>>> = adapters.iter().map(products_of).collect();
        for adapter in order {
            for unit in &members[adapter].units {
                let product = products[adapter][unit.part];
                let part = Part { adapter, product, unit: unit.clone() };
                match (is_vector(product.module), allowed.kept) {
                    (false, _) => found.entry(&unit.identity).or_default().push(part),
                    (true, false) => of_vectors.entry(&unit.identity).or_default().push(part),
                    (true, true) => {}
                }
            }
        }
        let sums = found.into_values().map(|parts| Sum::of(parts, adapters));
        let kept = adapters.iter().flat_map(|adapter| adapter.modules().values());
        let kept = kept.filter(|module| is_vector(module) && allowed.kept).collect();
        let vectors = of_vectors.into_values().map(|parts| Sum::of(parts, adapters));
        let vectors = vectors.collect::<Result<_>>()?;
        let modules = sums.collect::<Result<Vec<_>>>()?;
        for places in stacks::parameters(&modules) {
            let (first, count) = (&modules[places[0]], places.len());
            if first.expert.is_some_and(|expert| expert.count != count as u64) {
                return Err(Error::unsupported(
                    adapters[names].path(),
                    format!(
                        "has some experts of {} one by one, and another adapter those of all together; \
                         bring both to one format first (lorafast.convert)",
                        first.name()
                    ),
                ));
            }
        }
        Ok(Self { modules, kept, vectors, names })
    }
}

impl Sums<'_> {
    /// Finds the kernels of convolutions whose factors have them and the inputs taken together. What is
    /// said of those of which nothing tells, in words.
    pub fn find_kernels(&mut self, base: Option<&Checkpoint>) -> Option<String> {
        let is_open = |sum: &&mut Sum<'_>| {
            sum.layer.inputs.len() == 1 && sum.module.delta.may_flatten_kernel()
        };
        let mut open: Vec<&mut Sum<'_>> = self.modules.iter_mut().filter(is_open).collect();
        let Some(base) = base else {
            return open.first().map(|first| {
                format!(
                    "{} modules can be convolutions with the inputs and the kernel taken together (the \
                     first: {}); they are written as linear layers, and with the base (base=, --base) as \
                     what they are",
                    open.len(),
                    first.name()
                )
            });
        };
        let found = convert::flattened_inputs(open.iter().map(|sum| sum.module), base);
        for (sum, inputs) in open.iter_mut().zip(found) {
            if let Some(inputs) = inputs {
                sum.layer = Layer { kind: LayerKind::Convolution, inputs, turns: false };
            }
        }
        None
    }
}

impl<'a> Sum<'a> {
    fn of(mut parts: Vec<Part<'a>>, adapters: &[Adapter]) -> Result<Self> {
        let path = |part: &Part<'_>| adapters[part.adapter].path();
        // An embedding's product is (width, vocabulary), as PEFT has it: whatever the order of the adapters,
        // methods that look at rows or entries see the same.
        let is_across = |part: &Part<'_>| {
            let module = part.product.module;
            let is_of_width = module.kind == LayerKind::Embedding && !module.delta.is_by_tokens();
            is_of_width && part.unit.is_transposed && part.unit.outputs.is_none()
        };
        if parts.iter().any(is_across) {
            for part in &mut parts {
                part.unit.is_transposed ^= true;
                part.unit.shape.reverse();
            }
        }
        let first = &parts[0];
        let Some(whole) = parts.iter().find(|part| part.is_whole()) else {
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
        let expert = whole.product.expert;
        if let Some(other) = parts.iter().find(|part| part.unit.shape != shape) {
            let [rows, columns] = other.unit.shape;
            return Err(Error::adapter(
                path(other),
                format!(
                    "adds a {rows}×{columns} product to {}, to which {} adds one of {}×{}: they \
                     belong to different models",
                    other.product.module.title(),
                    path(whole).display(),
                    shape[0],
                    shape[1]
                ),
            ));
        }
        let layer = Layer::of(module, &parts, shape);
        parts.sort_by_key(|part| part.adapter);
        if let Some(twice) = parts.windows(2).find(|pair| pair[0].adapter == pair[1].adapter) {
            return Err(Error::unsupported(
                path(&twice[0]),
                format!("changes {} by several of its modules", module.title()),
            ));
        }
        Ok(Self { module, expert, shape: shape.map(|extent| extent as usize), layer, parts })
    }

    /// The number of outputs, as factors are written.
    pub fn outputs(&self) -> u64 {
        self.shape[usize::from(self.layer.turns)] as u64
    }

    /// What is added by an adapter, if it has the module.
    pub fn part_of(&self, adapter: usize) -> Option<&Part<'a>> {
        self.parts.iter().find(|part| part.adapter == adapter)
    }

    /// What it is called in messages and reports.
    pub fn name(&self) -> String {
        match self.module.only_parameter().filter(|_| self.expert.is_some()) {
            Some(parameter) => format!("{}.{}", self.module.path, parameter.name),
            None => self.module.title().into_owned(),
        }
    }

    /// What random masks know it by, as those of a merge do.
    pub fn mask_name(&self) -> String {
        match self.expert {
            Some(expert) => format!("{}.{}", self.module.key, expert.index),
            None => self.name(),
        }
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

impl Layer {
    fn of(module: &Module, parts: &[Part<'_>], [rows, columns]: [u64; 2]) -> Self {
        let own = || parts.iter().map(|part| part.product.module);
        if own().any(|module| module.kind == LayerKind::Embedding) {
            let is_embedding = module.kind == LayerKind::Embedding;
            let turns = !is_embedding || module.delta.is_by_tokens();
            let inputs = vec![if turns { rows } else { columns }];
            return Self { kind: LayerKind::Embedding, inputs, turns };
        }
        // Of a convolution whose kernel some have flattened, what the others have.
        let whole = parts.iter().filter(|part| part.is_whole()).map(|part| part.product.module);
        let longest = whole.fold(module, |best, other| {
            let extents = |one: &Module| one.delta.input_shape().len();
            if extents(other) > extents(best) { other } else { best }
        });
        Self { kind: longest.kind, inputs: longest.delta.input_shape(), turns: false }
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

    /// Whether it is all that its module adds, or all of one of its experts, as it stands.
    pub fn is_whole(&self) -> bool {
        self.unit.outputs.is_none() && !self.unit.is_transposed
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
        let module = self.product.module;
        let read = self.product.read_owned()?;
        // The result's module has the same place, and is added as often.
        let repeats = module.repeats();
        if self.unit.outputs.is_none() && !self.unit.is_transposed {
            return Ok(ReadPart { factors: Read::Whole(read), repeats });
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
    let told = adapter.semantics().transposed_experts;
    let is_of_layers = told == Some(TransposedExperts::IfStoredTransposed);
    say(
        "factors of all experts as a release of PEFT before 0.19.1 lays them, whose orientation other \
         programs do not have",
        modules(&|module| {
            module.delta.holds_experts() && !module.delta.is_of_layers() && !is_of_layers
        }),
    );
    say(
        "factors of all experts of which nothing tells to which parameter they belong",
        modules(&|module| module.delta.holds_experts() && module.only_parameter().is_none()),
    );
    say(
        "factors of all experts that began with a part of the base's weight",
        modules(&|module| module.delta.holds_experts() && allowed.initialization),
    );
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
