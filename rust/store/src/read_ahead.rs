//! Reading ahead: an object's planned ranges, cut into windows that are asked for before they are needed.

use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lorafast::storage::source::Requests;
use lorafast::{Error, Result};

use crate::buffers::Buffer;
use crate::runtime;
use crate::source::Pinned;

/// How often a waiting thread looks whether it is still to wait.
const STEP: Duration = Duration::from_millis(50);
/// How far behind the furthest read a window is given up when memory is short.
const BEHIND: usize = 8;

/// The windows of one object.
#[derive(Debug)]
pub(crate) struct ReadAhead {
    object: Arc<Pinned>,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By their beginnings, which is the plan's order.
    windows: Vec<Window>,
    /// The first that may not have been asked for.
    next: usize,
    /// The furthest that somebody read.
    furthest: usize,
    /// Bytes that are held or on their way.
    held: u64,
    /// Whether somebody reads it, and it has its share of the budget.
    is_read: bool,
    /// Windows of which something is still to be read.
    open: usize,
}

#[derive(Debug)]
struct Window {
    range: Range<u64>,
    /// Bytes of it that are still to be read, as often as the plan reads them.
    left: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// Not asked for.
    Absent,
    /// Asked for.
    Coming,
    Here(Arc<Buffer>),
    Failed(Failure),
}

/// An error that several threads can be told.
#[derive(Debug, Clone)]
struct Failure(Arc<Mutex<Option<Error>>>, String, String);

impl Failure {
    fn new(error: Error, name: String) -> Self {
        let text = error.to_string();
        let text = text.strip_prefix(&format!("{name}: ")).unwrap_or(&text).to_owned();
        Self(Arc::new(Mutex::new(Some(error))), name, text)
    }

    /// The error itself the first time, and its words afterwards.
    fn raise(&self) -> Error {
        let own = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        own.unwrap_or_else(|| Error::store(&self.1, self.2.clone()))
    }
}

impl ReadAhead {
    pub fn new(object: Arc<Pinned>) -> Self {
        Self { object, state: Mutex::default(), arrived: Condvar::new() }
    }

    /// Notes what will be read, but for the first bytes of the object, which are here.
    pub fn plan(&self, ranges: &[Range<u64>], head: u64) {
        let size = self.object.connection.budget.window();
        let windows = cut(ranges, head, size);
        let mut state = self.lock();
        self.forget(&mut state);
        state.open = windows.len();
        state.windows = windows;
    }

    /// How many windows these ranges have, and how many bytes.
    pub fn requests(ranges: &[Range<u64>], head: u64, size: u64) -> Requests {
        let windows = cut(ranges, head, size);
        let bytes = windows.iter().map(|window| window.range.end - window.range.start).sum();
        Requests { requests: windows.len() as u64, bytes }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives everything back.
    fn forget(&self, state: &mut State) {
        let budget = &self.object.connection.budget;
        let held = |window: &Window| match window.content {
            // What is on its way is given back when it comes and nobody is there.
            Content::Here(_) => window.range.end - window.range.start,
            _ => 0,
        };
        let here: u64 = state.windows.iter().map(held).sum();
        budget.give_back_read(here);
        if state.is_read {
            budget.end_reading();
        }
        *state = State::default();
    }

    /// Whether all of a range is planned, and not read already as often as it was to be.
    pub fn covers(&self, offset: u64, length: u64) -> bool {
        let (state, end) = (self.lock(), offset + length);
        let mut at = offset;
        let first = state.windows.partition_point(|window| window.range.end <= at);
        for window in &state.windows[first..] {
            if at >= end || window.range.start > at || window.left == 0 {
                break;
            }
            at = window.range.end;
        }
        at >= end
    }

    /// Reads from windows, and what no window has from the store.
    ///
    /// # Errors
    /// Those of the store; [`Error::Cancelled`].
    pub fn read_at(self: &Arc<Self>, buffer: &mut [u8], offset: u64) -> Result<()> {
        let end = offset + buffer.len() as u64;
        let mut at = offset;
        while at < end {
            let (part, within) = self.part(at, end)?;
            let length = part.end - part.start;
            let target = &mut buffer[(at - offset) as usize..][..length as usize];
            match within {
                Some((content, start)) => {
                    let from = (part.start - start) as usize;
                    target.copy_from_slice(&content[from..from + length as usize]);
                    drop(content);
                    self.consumed(&part);
                }
                None => {
                    let content =
                        runtime::wait(&self.object.connection.stop, self.object.read(part))?;
                    target.copy_from_slice(&content);
                }
            }
            at += length;
        }
        Ok(())
    }

    /// The part of a range that one window has, with its content and where it begins, or that lies between
    /// windows. Waits for the window.
    #[allow(clippy::type_complexity, reason = "a range, and perhaps bytes with their position")]
    fn part(
        self: &Arc<Self>,
        at: u64,
        end: u64,
    ) -> Result<(Range<u64>, Option<(Arc<Buffer>, u64)>)> {
        let mut state = self.lock();
        let position = state.windows.partition_point(|window| window.range.end <= at);
        let Some(range) = state.windows.get(position).map(|window| window.range.clone()) else {
            return Ok((at..end, None));
        };
        if range.start > at {
            return Ok((at..end.min(range.start), None));
        }
        if !state.is_read {
            state.is_read = true;
            self.object.connection.budget.begin_reading();
        }
        state.furthest = state.furthest.max(position);
        loop {
            match &state.windows[position].content {
                Content::Here(content) => {
                    let found = Some((content.clone(), range.start));
                    self.ask_ahead(&mut state);
                    return Ok((at..end.min(range.end), found));
                }
                Content::Failed(failure) => return Err(failure.raise()),
                Content::Coming => {}
                Content::Absent => {
                    // One that was given up or read to its end is read once more.
                    let length = range.end - range.start;
                    if state.windows[position].left == 0 {
                        state.windows[position].left = length;
                        state.open += 1;
                    }
                    if !self.object.connection.budget.force_for_read(length) {
                        self.give_up(&mut state);
                    }
                    self.ask(&mut state, position);
                    self.ask_ahead(&mut state);
                }
            }
            if self.object.connection.stop.is_raised() {
                return Err(Error::Cancelled);
            }
            state =
                self.arrived.wait_timeout(state, STEP).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Gives windows up that lie far behind, where memory is short.
    fn give_up(&self, state: &mut State) {
        let last = state.furthest.saturating_sub(BEHIND);
        for position in 0..last {
            let window = &mut state.windows[position];
            if matches!(window.content, Content::Here(_)) {
                let length = window.range.end - window.range.start;
                window.content = Content::Absent;
                state.held -= length;
                self.object.connection.budget.give_back_read(length);
            }
        }
    }

    /// Asks for the windows that follow, as far as the budget goes.
    fn ask_ahead(self: &Arc<Self>, state: &mut State) {
        state.next = state.next.max(state.furthest);
        while let Some(window) = state.windows.get(state.next) {
            if matches!(window.content, Content::Absent) && window.left > 0 {
                let length = window.range.end - window.range.start;
                if !self.object.connection.budget.take_for_read(length, state.held) {
                    break;
                }
                let next = state.next;
                self.ask(state, next);
            }
            state.next += 1;
        }
    }

    /// Asks for a window, whose bytes were taken from the budget.
    fn ask(self: &Arc<Self>, state: &mut State, position: usize) {
        let range = state.windows[position].range.clone();
        state.windows[position].content = Content::Coming;
        state.held += range.end - range.start;
        let own = self.clone();
        runtime::handle().spawn(async move {
            let buffers = &own.object.connection.budget.buffers;
            let mut buffer = buffers.take((range.end - range.start) as usize);
            let read = own.object.read_into(range.clone(), &mut buffer.content).await;
            own.came(&range, read.map(|()| buffer));
        });
    }

    fn came(&self, range: &Range<u64>, read: Result<Buffer>) {
        let mut state = self.lock();
        let length = range.end - range.start;
        let position = state.windows.partition_point(|window| window.range.end <= range.start);
        let window = state.windows.get_mut(position);
        let window = window
            .filter(|window| window.range == *range && matches!(window.content, Content::Coming));
        let Some(window) = window else {
            // Nobody waits for it any more.
            self.object.connection.budget.give_back_read(length);
            return;
        };
        match read {
            Ok(content) => window.content = Content::Here(Arc::new(content)),
            Err(error) => {
                window.content = Content::Failed(Failure::new(error, self.object.shown()));
                state.held -= length;
                self.object.connection.budget.give_back_read(length);
            }
        }
        drop(state);
        self.arrived.notify_all();
    }

    /// Notes that a part of a window was read, which is forgotten with its last part.
    fn consumed(self: &Arc<Self>, part: &Range<u64>) {
        let mut state = self.lock();
        let position = state.windows.partition_point(|window| window.range.end <= part.start);
        let Some(window) = state.windows.get_mut(position) else { return };
        let length = window.range.end - window.range.start;
        let before = window.left;
        window.left = before.saturating_sub(part.end - part.start);
        if before > 0 && window.left == 0 {
            let is_here = matches!(window.content, Content::Here(_));
            window.content = Content::Absent;
            state.open -= 1;
            if is_here {
                state.held -= length;
                self.object.connection.budget.give_back_read(length);
            }
            if state.open == 0 && state.is_read {
                state.is_read = false;
                self.object.connection.budget.end_reading();
            }
            self.ask_ahead(&mut state);
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.lock());
        self.forget(&mut state);
    }
}

/// The windows of some ranges: neighbours together, apart where there is a gap, none of them in the first
/// bytes.
fn cut(ranges: &[Range<u64>], head: u64, size: u64) -> Vec<Window> {
    let mut sorted: Vec<_> = ranges
        .iter()
        .map(|range| range.start.max(head)..range.end)
        .filter(|range| range.start < range.end)
        .collect();
    sorted.sort_by_key(|range| range.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in &sorted {
        match runs.last_mut() {
            Some(run) if run.end >= range.start => run.end = run.end.max(range.end),
            _ => runs.push(range.clone()),
        }
    }
    let mut windows = Vec::new();
    for run in runs {
        let mut start = run.start;
        while start < run.end {
            let end = run.end.min(start + size);
            windows.push(Window { range: start..end, left: 0, content: Content::Absent });
            start = end;
        }
    }
    for range in &sorted {
        let first = windows.partition_point(|window| window.range.end <= range.start);
        for window in
            windows[first..].iter_mut().take_while(|window| window.range.start < range.end)
        {
            window.left += window.range.end.min(range.end) - window.range.start.max(range.start);
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn windows(ranges: &[Range<u64>], head: u64, size: u64) -> Vec<(u64, u64, u64)> {
        let all = cut(ranges, head, size);
        all.iter().map(|window| (window.range.start, window.range.end, window.left)).collect()
    }

    #[test]
    fn windows_cover_what_is_planned_and_no_more() {
        assert_eq!(windows(&[0..10, 10..25], 4, 10), [(4, 14, 10), (14, 24, 10), (24, 25, 1)]);
        assert_eq!(windows(&[20..30, 5..8], 0, 100), [(5, 8, 3), (20, 30, 10)]);
        // What is read twice is kept for the second time.
        assert_eq!(windows(&[0..10, 5..10, 0..4], 0, 6), [(0, 6, 11), (6, 10, 8)]);
        assert_eq!(windows(&[0..4, 3..3], 4, 6), []);
    }
}
