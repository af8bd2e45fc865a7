//! The floor of any merge through the page cache: reading and writing a checkpoint's bytes in tiles
//! as the executor does, and no arithmetic; in turn with `cp`.
//!
//!     cargo bench --bench floor -- BASE SCRATCH       # a directory of shards; one not there yet
//!
//! Every shard is read into a buffer and written from it by a thread of its own, as two shards are
//! merged on two cores. Medians and least of eleven rounds, after two that are not counted.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use lorafast::storage::local;

/// Rows of 2048 elements of 16 bits, as many as the executor takes.
const TILE_BYTES: usize = 480 << 10;
const ROUNDS: usize = 11;

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn shards(base: &Path) -> Result<Vec<PathBuf>, Failure> {
    let paths = fs::read_dir(base)?.map(|entry| entry.map(|entry| entry.path()));
    let paths = paths.collect::<Result<Vec<_>, _>>()?;
    Ok(paths
        .into_iter()
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect())
}

/// Copies one file tile by tile, the first one the header's length.
fn copy(source: &Path, target: &Path) -> Result<(), Failure> {
    let source = File::open(source)?;
    let length = source.metadata()?.len();
    let mut word = [0; 8];
    local::read_at(&source, &mut word, 0)?;
    let header = 8 + u64::from_le_bytes(word);
    let target = File::options().write(true).create(true).truncate(true).open(target)?;
    target.set_len(length)?;
    local::allocate(&target, length);
    let mut buffer = vec![0; TILE_BYTES.max(header as usize)];
    let mut start = 0;
    while start < length {
        let count = if start == 0 { header } else { TILE_BYTES as u64 }.min(length - start);
        let tile = &mut buffer[..count as usize];
        local::read_at(&source, tile, start)?;
        local::write_at(&target, tile, start)?;
        start += count;
    }
    Ok(())
}

fn tiled(base: &Path, scratch: &Path) -> Result<(), Failure> {
    fs::create_dir(scratch)?;
    std::thread::scope(|scope| {
        let threads = shards(base)?.into_iter().map(|source| {
            let target = scratch.join(source.file_name().expect("it has an extension"));
            scope.spawn(move || copy(&source, &target))
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn copied_by_cp(base: &Path, scratch: &Path) -> Result<(), Failure> {
    let status = Command::new("cp").arg("-r").args([base, scratch]).status()?;
    if status.success() { Ok(()) } else { Err("cp failed".into()) }
}

fn main() -> Result<(), Failure> {
    let paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let paths: Vec<_> = paths.into_iter().filter(|path| path.as_os_str() != "--bench").collect();
    let [base, scratch] = paths.as_slice() else {
        eprintln!("give the directory of a model, and one that is not there yet");
        return Ok(());
    };
    let bytes: u64 = shards(base)?.iter().map(|path| path.metadata().map_or(0, |m| m.len())).sum();
    let mut seconds = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS + 2 {
        for (way, seconds) in [copied_by_cp, tiled].iter().zip(&mut seconds) {
            // What an earlier round has yet to write is not this one's to pay for.
            Command::new("sync").status()?;
            let begin = Instant::now();
            way(base, scratch)?;
            let taken = begin.elapsed().as_secs_f64();
            fs::remove_dir_all(scratch)?;
            if round >= 2 {
                seconds.push(taken);
            }
        }
    }
    for (name, mut seconds) in ["cp -r", "in tiles"].into_iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        let (least, median) = (seconds[0], seconds[ROUNDS / 2]);
        let rate = bytes as f64 / median / 1e9;
        println!("{name:9} {median:.3} s (least {least:.3}), {rate:.2} GB/s");
    }
    Ok(())
}
