//! The arguments, made into guest memory and the orders in which vCPUs touch it.

use super::{Args, Memory, Overlap};
use crate::baseline::host::Backing;
use crate::baseline::tables_for;
use crate::race::{Course, Leg, Order};
use crate::report::Error;
use crate::size::show;
use crate::sys;
use tdp_arch::addr::MAX_PHYSICAL_BITS;
use tdp_arch::{ENTRIES_PER_TABLE, Ept, Gfn, GfnRange, Level, PAGE_SHIFT, PAGE_SIZE, Pfn};

/// Where guest memory starts: not at zero, where mistakes look right.
const GUEST_START: Gfn = Gfn(1 << 18);
/// Host frame less guest frame of a page. A multiple of 1 GiB, so that every page size fits.
const HOST_OFFSET: u64 = 1 << 27;
/// Table frames that a vCPU may hold ready.
const SPARE_TABLES: u64 = 64;

/// What will be run.
#[derive(Debug)]
pub(super) struct Plan {
    /// Guest memory of all vCPUs.
    pub(super) backing: Backing,
    /// Level of the root table.
    pub(super) root: Level,
    /// The course of a single vCPU, and of all of them if there are more.
    pub(super) courses: Vec<Circuit>,
    /// Table frames that the library may use.
    pub(super) frames: usize,
}

/// A course and what is mapped after it.
#[derive(Debug)]
pub(super) struct Circuit {
    pub(super) course: Course,
    /// The first frame after the course's pages, which begin where guest memory does.
    pub(super) end: Gfn,
}

impl Plan {
    pub(super) fn new(args: &Args) -> Result<Self, Error> {
        let level = args.backing.level();
        let vcpus = usize::from(args.vcpus);
        if !args.bytes.is_multiple_of(level.bytes()) {
            return Err(Error::Usage(format!(
                "-b {}: is not a multiple of the page size, {} (-s)",
                show(args.bytes),
                show(level.bytes())
            )));
        }
        if !args.cpus.is_empty() && args.cpus.len() < vcpus {
            return Err(Error::Usage(format!(
                "-c names {} processors for {vcpus} vCPUs (-v)",
                args.cpus.len()
            )));
        }
        if args.visibility != Memory::Shared {
            if level > Level::L2 || args.levels != 4 {
                return Err(Error::Usage(
                    "--visibility: a confidential guest has pages of 4K or 2M and 4 levels (-s, --levels)"
                        .to_owned(),
                ));
            }
            if !args.format.includes::<Ept>() {
                return Err(Error::Usage(
                    "--visibility: a confidential guest has tables in the EPT format (-f)"
                        .to_owned(),
                ));
            }
        }
        let root = if args.levels == 5 {
            Level::L5
        } else {
            Level::L4
        };
        // Neither a guest frame number nor the host's may need more bits than there are.
        let limit = root
            .gfn_limit()
            .0
            .min(1 << (MAX_PHYSICAL_BITS - PAGE_SHIFT))
            - HOST_OFFSET;
        let pages = u64::from(args.vcpus) * (args.bytes / PAGE_SIZE);
        let gfns = GfnRange::new(GUEST_START, pages)
            .filter(|range| range.end.0 <= limit)
            .ok_or_else(|| {
                Error::Usage(format!(
                    "-v {vcpus} -b {}: does not fit the addresses of {} levels (--levels)",
                    show(args.bytes),
                    args.levels
                ))
            })?;
        let backing = Backing {
            gfns,
            pfn: Pfn(GUEST_START.0 + HOST_OFFSET),
            level,
        };
        let mut courses = vec![Circuit::new(args, level, 1, args.cpus.clone())?];
        if vcpus > 1 {
            courses.push(Circuit::new(args, level, vcpus, cpus(args))?);
        }
        Ok(Self {
            backing,
            root,
            courses,
            frames: frames(args, gfns, level, root)?,
        })
    }
}

/// Processors for several vCPUs: those asked for, or one for each if there are as many. Left to the scheduler, two threads
/// of a few milliseconds may be run one after the other on one processor, which is not what is to be measured.
fn cpus(args: &Args) -> Vec<usize> {
    if !args.cpus.is_empty() {
        return args.cpus.clone();
    }
    let vcpus = usize::from(args.vcpus);
    let mut cpus = sys::allowed();
    cpus.truncate(vcpus);
    if cpus.len() < vcpus { Vec::new() } else { cpus }
}

/// Frames for the library's tables: what was asked for, or what the run needs.
fn frames(args: &Args, gfns: GfnRange, level: Level, root: Level) -> Result<usize, Error> {
    let frames = match args.pool {
        Some(bytes) => bytes / PAGE_SIZE,
        None => tables_for(gfns, level, root) + SPARE_TABLES * (u64::from(args.vcpus) + 1),
    };
    let bytes = frames.saturating_mul(PAGE_SIZE);
    let available = sys::available_memory().unwrap_or(u64::MAX);
    if bytes > available {
        return Err(Error::run(
            "frame pool",
            format!(
                "{} of tables do not fit the {} MiB of memory that are free",
                show(bytes),
                available >> 20
            ),
        ));
    }
    usize::try_from(frames).map_err(|e| Error::run("frame pool", e))
}

impl Circuit {
    fn new(args: &Args, page: Level, vcpus: usize, cpus: Vec<usize>) -> Result<Self, Error> {
        let (per, vcpus) = (args.bytes / page.bytes(), vcpus as u64);
        let total = per * vcpus;
        let orders = (0..vcpus)
            .map(|vcpu| match args.overlap {
                None => Ok(Order(vec![leg(args, vcpu, vcpu * per, per)?])),
                Some(Overlap::Pages) => Ok(Order(vec![leg(args, vcpu, 0, total)?])),
                Some(Overlap::Regions) => shared_regions(args, total, vcpu, vcpus),
            })
            .collect::<Result<_, _>>()?;
        let course = Course {
            base: GUEST_START,
            page,
            orders,
            cpus,
        };
        Ok(Self {
            course,
            end: Gfn(GUEST_START.0 + total * page.pages()),
        })
    }
}

/// One vCPU's pages, from the `first`-th on.
fn leg(args: &Args, vcpu: u64, first: u64, count: u64) -> Result<Leg, Error> {
    if args.random {
        shuffled(first, count, args.seed.wrapping_add(vcpu)).map(Leg::List)
    } else {
        Ok(Leg::Run { first, count })
    }
}

/// One vCPU's part of every region: all vCPUs are in the same region, which is what one table maps, at the same time,
/// and each has its own pages of it, side by side or at random.
fn shared_regions(args: &Args, total: u64, vcpu: u64, vcpus: u64) -> Result<Order, Error> {
    const REGION: u64 = ENTRIES_PER_TABLE as u64;
    let legs = (0..total.div_ceil(REGION)).map(|number| {
        let first = number * REGION;
        let count = REGION.min(total - first);
        let mine = count * vcpu / vcpus..count * (vcpu + 1) / vcpus;
        if args.random {
            // The same for all vCPUs, so that their parts are disjoint.
            let pages = shuffled(first, count, args.seed.wrapping_add(number))?;
            Ok(Leg::List(
                pages[mine.start as usize..mine.end as usize].to_vec(),
            ))
        } else {
            Ok(Leg::Run {
                first: first + mine.start,
                count: mine.end - mine.start,
            })
        }
    });
    legs.collect::<Result<_, _>>().map(Order)
}

/// `count` pages from the `first`-th on, in an order that follows from `seed`.
pub(crate) fn shuffled(first: u64, count: u64, seed: u64) -> Result<Vec<u32>, Error> {
    let too_many = |e: Box<dyn std::error::Error + Send + Sync>| {
        Error::run(format!("-a with {count} pages a vCPU"), e)
    };
    let length = usize::try_from(count).map_err(|e| too_many(e.into()))?;
    let mut list = Vec::new();
    list.try_reserve_exact(length)
        .map_err(|e| too_many(e.into()))?;
    for number in first..first + count {
        list.push(u32::try_from(number).map_err(|e| too_many(e.into()))?);
    }
    let mut state = seed;
    for i in (1..list.len()).rev() {
        // The high half of the product is at most i, and even enough for an order of pages.
        let j = (u128::from(split_mix(&mut state)) * (i as u128 + 1)) >> 64;
        list.swap(i, j as usize);
    }
    Ok(list)
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn plan(line: &str) -> Result<Plan, Error> {
        Plan::new(
            &Line::try_parse_from(std::iter::once("x").chain(line.split_whitespace()))
                .unwrap()
                .args,
        )
    }

    /// How often each page is touched on the last course.
    fn touches(plan: &Plan) -> Vec<u32> {
        let circuit = plan.courses.last().unwrap();
        let mut counts =
            vec![0; ((circuit.end.0 - GUEST_START.0) / plan.backing.level.pages()) as usize];
        let legs = circuit.course.orders.iter().flat_map(|order| &order.0);
        legs.for_each(|leg| match leg {
            Leg::Run { first, count } => {
                (*first..first + count).for_each(|i| counts[i as usize] += 1)
            }
            Leg::List(list) => list.iter().for_each(|&i| counts[i as usize] += 1),
        });
        counts
    }

    #[test]
    fn disjoint_orders_touch_every_page_once_and_overlap_as_often_as_it_says() {
        for random in ["", "-a"] {
            for (overlap, times) in [("", 1), ("-o=regions", 1), ("-o", 1), ("-o=pages", 3)] {
                for size in ["-s 4k -b 1M", "-s 2m -b 64M"] {
                    let plan = plan(&format!("-v 3 {size} {overlap} {random}")).unwrap();
                    assert!(
                        touches(&plan).iter().all(|&n| n == times),
                        "{overlap} {random} {size}"
                    );
                    assert_eq!(plan.courses.last().unwrap().end, plan.backing.gfns.end);
                }
            }
        }
    }

    #[test]
    fn an_order_follows_from_its_seed() {
        let order = |seed| shuffled(0, 1000, seed).unwrap();
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
        assert_ne!(order(1), (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn shared_regions_are_shared_leg_by_leg() {
        let plan = plan("-v 3 -b 3M -o -a").unwrap();
        let orders = &plan.courses.last().unwrap().course.orders;
        for order in orders {
            assert_eq!(
                order.0.len(),
                5,
                "9 MiB are four regions of 2 MiB and a half"
            );
            for (region, leg) in order.0.iter().enumerate() {
                let Leg::List(pages) = leg else {
                    panic!("a random leg is a list")
                };
                assert!(pages.len() >= if region < 4 { 170 } else { 85 });
                assert!(pages.iter().all(|page| *page as usize / 512 == region));
            }
        }
    }

    #[test]
    fn refuses_what_does_not_go_together() {
        for (line, names) in [
            ("-b 1M -s 2m", "-b 1M"),
            ("-v 2 -c 0", "-c"),
            ("-b 4096T", "-b 4096T"),
            ("-v 2 -b 128T", "--levels"),
            ("-b 4M --pool 4096T", "frame pool"),
        ] {
            let error = plan(line).unwrap_err().to_string();
            assert!(error.contains(names), "{line}: {error}");
        }
        assert!(plan("-v 2 -b 512T -s 1g --levels 5").is_ok());
    }
}
